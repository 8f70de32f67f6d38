"""The report in a real browser, from file:// and without a network."""

from __future__ import annotations

import datetime as dt
import io
from collections import Counter
from pathlib import Path

import geopandas as gpd
import numpy as np
import pytest
import shapely
import xarray as xr
from affine import Affine
from odc.geo.geobox import GeoBox
from odc.geo.xr import xr_coords
from PIL import Image

from slidecube.catalog.scenes import Window
from slidecube.pipeline.evaluate import evaluate
from slidecube.pipeline.inventory import REASONS
from slidecube.pipeline.lineage import Lineage, LineageEpoch, LineageScene
from slidecube.pipeline.mosaic import TileRasters, label_objects
from slidecube.pipeline.quality import Edge, Quality
from slidecube.pipeline.report.page import write_report
from slidecube.pipeline.report.pictures import EpochView, Picture
from slidecube.pipeline.seams import EdgeStep

BAD = "<img src=x onerror=window.ran=1><script>window.ran=2</script>"
FRAME = GeoBox((4096, 4096), Affine(10, 0, 300_000, 0, -10, 4_800_000), "EPSG:32633")
GEOBOX = FRAME[512:768, 512:768]
GREEN, BROWN, RED, BLUE = (30, 110, 40), (150, 110, 60), (190, 30, 60), (20, 60, 190)
READY = "html[data-ready=true]"


def quality() -> Quality:
    """Edges whose overpasses are many, two to four layers, and a sensor's mismatch."""
    takes = [f"GS2B_201806{n:02}T101029_006{n:03}_N02.08" for n in range(1, 25)]
    step = EdgeStep(first=1, second=2, pairs=900, step=0.02, error=0.001, across=0.02, inside=0.004)
    shared = {"layer": "optical-2018-05-01_2018-09-05-6cfea84c", "variable": "B08", "tile": "r001c001"}
    overpass = Edge(kind="overpass", first=" + ".join(takes), second=" + ".join(takes[1:]), measured=step,
                    seam=True, **shared)  # fmt: skip
    tile = Edge(kind="tile", first="r001c001", second="r001c002", measured=step, seam=True,
                line=((0.0, 0.0), (0.0, 5120.0)), **shared)  # fmt: skip
    row: dict[str, object] = {
        "epoch": "event", "tile": "r001c001", "expected_px": 100, "observed_px": 60, "not_observable_px": 30,
        "missing_px": 10, "observed_share": 0.6, "tiles": 1, "shift_largest_px": None, "reason_1_px": 30,
    }  # fmt: skip
    row |= {f"reason_{i}_px": 0 for i in range(2, len(REASONS))}
    for side in ("pre", "post"):
        row |= {f"{side}_clear_{n}": 2 for n in ("min", "median", "max")} | {f"{side}_lost_scenes": 1}
        days = ("first", "last", "chosen_first", "chosen_last")
        row |= dict.fromkeys((f"{side}_{day}" for day in days), "2018-06-18")
    gap = {
        "layer": shared["layer"], "variable": "B08", "first": "sentinel-2a", "second": "sentinel-2b", "px": 9,
        "unit": "reflectance", "difference": 0.0125, "lowest": 0.01, "highest": 0.02, "blocks": 3,
    }  # fmt: skip
    return Quality(
        tiles=(row,), epochs=(row,), edges=(overpass, tile), gaps=(gap,), outline=shapely.box(-99, 9, 99, 999),
        omissions=("cast shadow: [cube.sun] cast_shadow = false",),
    )  # fmt: skip


def flat(colour: tuple[int, int, int]) -> Picture:
    return Picture(pixels=np.full((256, 256, 3), colour, np.uint8), geobox=GEOBOX)


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    landslide = np.zeros((256, 256), np.uint8)
    landslide[100:156, 100:156] = 1  # in the middle of the map
    landslide[120:130, 120:130] = 0
    landslide[30:50, 200:230] = 1
    observability = np.full((256, 256), 3, np.uint8)
    observability[:40, :40] = 2
    fields = {
        "probability": np.full((256, 256), 8000, np.uint16),
        "landslide": landslide,
        "observability": observability,
        "reason": (observability == 2).astype(np.uint8),
    }
    epoch = f"e{BAD}"
    inventory = xr.Dataset(
        {k: (("epoch", "y", "x"), v[None]) for k, v in fields.items()},
        coords={**xr_coords(GEOBOX), "epoch": [epoch]},
    )
    tile = TileRasters(
        key="t", offset_px=(512, 512), landslide=landslide, attributes={"probability": fields["probability"]}
    )
    objects = label_objects([tile], frame=FRAME, epoch=epoch, model="rdndvi@1")
    missed = shapely.box(305_500, 4_793_000, 305_900, 4_793_300)
    truth = gpd.GeoDataFrame(
        {"id": [f"a{BAD}", f"b{BAD}"]}, geometry=[objects.geometry[1], missed], crs=FRAME.crs
    )
    window = Window(start=dt.date(2018, 5, 1), end=dt.date(2018, 9, 5))
    lineage = Lineage(
        name=f"hostile{BAD}",
        run="run-01234567",
        created=dt.datetime(2026, 11, 20, tzinfo=dt.UTC),
        grid="g",
        epochs=(LineageEpoch(name=epoch, pre=window, post=window),),
        model={"name": f"m{BAD}", "version": 1},
        scenes=(
            LineageScene(
                id=f"S2{BAD}", source=BAD, datetime=dt.datetime(2018, 9, 1, tzinfo=dt.UTC), use="pre",
                href="javascript:window.ran=3",
            ),
        ),
        attributions=(BAD,),
        simulated=True,
    )  # fmt: skip
    view = EpochView(
        name=epoch,
        pre={"True colour": flat(GREEN), "False colour": flat(RED)},
        post={"True colour": flat(BROWN), "False colour": flat(BLUE)},
        evaluation=evaluate(objects, truth, inventory=inventory, simulated=True),
    )
    out = tmp_path_factory.mktemp("report") / "report"
    return write_report(
        out, inventory=inventory, objects=objects, views=[view], lineage=lineage, quality=quality()
    )


@pytest.fixture
def opened(browser, report):
    """The page, and everything that went wrong or left the machine while it was used."""
    page = browser.new_page(viewport={"width": 1500, "height": 1000})
    trouble: list[str] = []
    page.on("console", lambda m: trouble.append(m.text) if m.type in {"error", "warning"} else None)
    page.on("pageerror", lambda e: trouble.append(str(e)))
    page.on("requestfailed", lambda r: trouble.append(f"failed: {r.url}"))
    page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else trouble.append(r.url))
    page.goto(report.as_uri())
    page.wait_for_selector(READY, timeout=60_000)
    page.wait_for_function("() => Bokeh.documents.every(d => d.is_idle)")
    page.wait_for_timeout(500)
    yield page
    page.wait_for_timeout(200)
    assert trouble == []
    assert page.evaluate("window.ran") is None
    page.close()


def colours(page, panel: str) -> Counter:
    image = Image.open(io.BytesIO(page.locator(f"figure.{panel}").first.screenshot())).convert("RGB")
    return Counter({colour: n for n, colour in image.getcolors(1 << 24)})


def model(page, name: str, what: str):
    return page.evaluate(
        "([name, what]) => { for (const d of Bokeh.documents) { const m = d.get_model_by_name(name);"
        " if (m) return what.split('.').reduce((o, k) => o[k], m); } }",
        [name, what],
    )


def test_it_opens_with_pictures_and_polygons(opened):
    assert opened.locator("text=UNREVIEWED").count() >= 1
    assert opened.locator("p.banner").inner_text().startswith("SIMULATED")
    for panel, colour in (("pre", GREEN), ("post", BROWN)):
        assert colours(opened, panel).most_common(1)[0][0] == colour
    assert len(model(opened, "e0-post-tp", "data_source.data.xs")) == 1
    assert len(model(opened, "e0-post-fp", "data_source.data.xs")) == 1
    assert len(model(opened, "e0-post-fn", "data_source.data.xs")) == 1
    drawn = colours(opened, "post")
    for layer in ("tp", "fp", "fn"):
        swatch = opened.locator(f"label:has([data-layer={layer}]) .swatch").first
        line = swatch.evaluate("e => getComputedStyle(e).borderColor")
        rgb = tuple(int(v) for v in line.removeprefix("rgb(").removesuffix(")").split(","))
        assert drawn[rgb] > 20, layer
    natural = opened.locator("img:not([loading=lazy])").evaluate_all("all => all.map(i => i.naturalWidth)")
    assert natural
    assert min(natural) > 0


def test_the_maps_move_together(opened):
    opened.locator("figure.pre").first.scroll_into_view_if_needed()
    box = opened.locator("figure.pre").first.bounding_box()
    before = {p: (model(opened, f"e0-{p}", "x_range.start"), model(opened, f"e0-{p}", "y_range.start"))
              for p in ("pre", "post", "observed")}  # fmt: skip
    seen = opened.locator("figure.post").first.screenshot()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] * 0.8
    opened.mouse.move(x, y)
    opened.mouse.down()
    opened.mouse.move(x - 60, y - 20, steps=6)
    opened.mouse.up()
    opened.wait_for_timeout(500)
    width = model(opened, "e0-pre", "inner_width")
    scale = (model(opened, "e0-pre", "x_range.end") - model(opened, "e0-pre", "x_range.start")) / width
    for panel, (x0, y0) in before.items():
        assert model(opened, f"e0-{panel}", "x_range.start") - x0 == pytest.approx(60 * scale, rel=0.05)
        assert model(opened, f"e0-{panel}", "y_range.start") - y0 == pytest.approx(-20 * scale, rel=0.1)
    assert opened.locator("figure.post").first.screenshot() != seen


def test_a_metre_is_as_long_upwards_as_sideways(opened):
    for view in ("Most landslides", "Whole area"):
        opened.click(f"text={view}")
        x, y = (
            (model(opened, "e0-post", f"{a}_range.end") - model(opened, "e0-post", f"{a}_range.start"))
            / model(opened, "e0-post", inner)
            for a, inner in (("x", "inner_width"), ("y", "inner_height"))
        )
        assert x == pytest.approx(y, rel=0.01)


def test_renderings_and_layers_can_be_chosen(opened):
    opened.click("text=False colour")
    opened.wait_for_timeout(500)
    assert colours(opened, "pre").most_common(1)[0][0] == RED
    assert colours(opened, "post").most_common(1)[0][0] == BLUE
    assert opened.locator("text=False colour").get_attribute("aria-pressed") == "true"
    opened.uncheck("[data-layer=fn]")
    assert model(opened, "e0-post-fn", "visible") is False
    assert model(opened, "e0-pre-fn-dots", "visible") is False
    assert model(opened, "e0-post-tp", "visible") is True


def test_the_pointer_shows_an_objects_numbers_as_text(opened):
    opened.locator("figure.post").first.scroll_into_view_if_needed()
    box = opened.locator("figure.post").first.bounding_box()
    # left of the hole in the middle of the map, below the panel's title
    opened.mouse.move(box["x"] + box["width"] * 0.43, box["y"] + 30 + (box["height"] - 30) * 0.5)
    opened.wait_for_timeout(500)
    tip = ":is(.bk-Tooltip, .bk-tooltip) >> text="
    for text in ("-r0000612c0000612", "<script>window.ran=2</script>", "0.80"):
        assert opened.locator(tip + text).count() >= 1, text


def test_a_row_of_the_table_shows_its_object(opened):
    opened.locator("button.go").first.click()
    opened.wait_for_timeout(700)
    x = [model(opened, "e0-post", f"x_range.{end}") for end in ("start", "end")]
    assert x[0] < 1000 < 1560 < x[1]
    assert x[1] - x[0] < 2500


@pytest.mark.parametrize("width", [380, 800])
def test_nothing_overflows_on_a_small_screen(browser, report, width):
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.goto(report.as_uri())
    page.wait_for_selector(READY, timeout=60_000)
    page.wait_for_timeout(400)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()


def test_tables_of_quality_stay_on_the_page_whatever_an_edge_lies_between(browser, report):
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.goto(report.as_uri())
    page.wait_for_selector(READY, timeout=60_000)
    beyond = page.evaluate(
        "[...document.querySelectorAll('#quality .wide')].map(e => e.scrollWidth - e.clientWidth)"
    )
    assert beyond == [0, 0, 0]
    overpass = page.locator("#quality tr:has(th:text-is('overpass'))")
    assert "GS2B_20180601T101029_006001_N02.08 on the first side only" in overpass.inner_text()
    assert "GS2B_20180602" not in overpass.inner_text(), "both sides have it"
    head = page.locator("#quality table:has-text('standard errors') thead").inner_text().split("\t")
    assert [cell.strip() for cell in head[:5]] == ["kind", "tile", "step", "standard errors", "seam"]
    rows = page.locator("#quality table").first.locator("th").all_inner_texts()
    assert rows.index("not observable") + 1 == rows.index("no clear observation before the event")
    assert rows.index("missing: not processed") == rows.index("no clear observation before the event") + 1
    said = page.locator("#quality").inner_text()
    assert "Not looked for: cast shadow: [cube.sun] cast_shadow = false." in said
    assert "+0.0125" in said
    page.close()


def test_without_scripts_the_picture_and_the_numbers_stay(browser, report):
    page = browser.new_page(java_script_enabled=False, viewport={"width": 1200, "height": 800})
    page.goto(report.as_uri())
    assert page.locator("img[src='img/e0-overview.png']").is_visible()
    assert page.locator("#e0-accuracy table").first.is_visible()
    page.close()
