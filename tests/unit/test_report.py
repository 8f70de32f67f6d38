"""The report's numbers, its files, and that nothing from a catalogue can act in it."""

from __future__ import annotations

import dataclasses
import datetime as dt
import re
from html.parser import HTMLParser
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
from slidecube.pipeline import styles
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.evaluate import evaluate
from slidecube.pipeline.lineage import Lineage, LineageEpoch, LineageScene
from slidecube.pipeline.mosaic import TileRasters, label_objects
from slidecube.pipeline.quality import Edge
from slidecube.pipeline.report import numbers, page, pictures
from slidecube.pipeline.report.maps import layer_source
from slidecube.pipeline.report.page import write_report
from slidecube.pipeline.report.pictures import EpochView, Picture
from slidecube.pipeline.report.static import render_picture
from slidecube.pipeline.seams import EdgeStep

FRAME = GeoBox((4096, 4096), Affine(10, 0, 300_000, 0, -10, 4_800_000), "EPSG:32633")
SHAPE = (90, 110)
GEOBOX = FRAME[100:190, 200:310]
BAD = "<script>window.ran=1</script><img src=x onerror=window.ran=1>'\"&"


def case(*, epoch: str = "e1", hostile: bool = False, empty: bool = False) -> dict:
    rng = np.random.default_rng(3)
    landslide = np.zeros(SHAPE, np.uint8)
    if not empty:
        landslide[10:20, 10:18] = landslide[40:43, 60:64] = landslide[70:80, 80:100] = 1
        landslide[14:16, 13:15] = 0
    observability = np.full(SHAPE, 3, np.uint8)
    observability[:, 100:] = 1
    observability[60:66, :50] = 2
    reason = np.zeros(SHAPE, np.uint8)
    reason[60:63, :50], reason[63:66, :50] = 1, 5
    landslide[observability != 3] = 255
    fields = {
        "probability": rng.integers(0, 10001, SHAPE).astype(np.uint16),
        "spread": np.zeros(SHAPE, np.uint16),
        "landslide": landslide,
        "observability": observability,
        "reason": reason,
    }
    inventory = xr.Dataset(
        {k: (("epoch", "y", "x"), v[None]) for k, v in fields.items()},
        coords={**xr_coords(GEOBOX), "epoch": [epoch]},
    )
    attributes = {"probability": fields["probability"], "slope_deg": np.full(SHAPE, 2700, np.uint16)}
    tile = TileRasters(key="t", offset_px=(100, 200), landslide=landslide, attributes=attributes)
    objects = label_objects([tile], frame=FRAME, epoch=epoch, model="rdndvi@1", detect_key="d" * 16)
    photo = Picture(pixels=rng.integers(1, 255, (*SHAPE, 3)).astype(np.uint8), geobox=GEOBOX)
    bad = BAD if hostile else ""
    lineage = Lineage(
        name=f"test{bad}",
        run="run-01234567",
        created=dt.datetime(2026, 11, 20, tzinfo=dt.UTC),
        grid="g",
        epochs=(
            LineageEpoch(
                name=epoch,
                pre=Window(start=dt.date(2018, 5, 1), end=dt.date(2018, 9, 5)),
                post=Window(start=dt.date(2018, 9, 7), end=dt.date(2018, 11, 15)),
            ),
        ),
        model={"name": f"rdndvi{bad}", "version": 1},
        scenes=(
            LineageScene(
                id=f"S2A{bad}",
                source=f"local{bad}",
                datetime=dt.datetime(2018, 9, 1, tzinfo=dt.UTC),
                use="pre",
                href="javascript:window.ran=1" if hostile else "https://example.com/S2A",
            ),
        ),
        licences={"local": f"none{bad}"},
        attributions=(f"Contains modified Copernicus Sentinel data{bad}",),
        simulated=True,
    )
    view = EpochView(name=epoch, pre={"True colour": photo}, post={"True colour": photo})
    return {"inventory": inventory, "objects": objects, "lineage": lineage, "view": view}


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def write(tmp_path: Path, c: dict, **kw) -> Path:
    return write_report(
        tmp_path / "report",
        inventory=c["inventory"],
        objects=c["objects"],
        views=[c["view"]],
        lineage=c["lineage"],
        **kw,
    )


def tags_of(index: Path) -> list[tuple[str, dict[str, str | None]]]:
    parser = Tags()
    parser.feed(index.read_text())
    return parser.tags


def test_every_file_that_the_page_names_lies_beside_it(tmp_path):
    index = write(tmp_path, case())
    named = [a.get("src") or (a.get("href") if t == "link" else None) for t, a in tags_of(index)]
    named = [n for n in named if n]
    assert {"report.css", "js/bokeh.min.js", "js/figures.js", "js/report.js", "img/e0-overview.png"} <= set(
        named
    )
    for name in named:
        assert (index.parent / name).is_file(), name
    in_figures = set(re.findall(r"img/[\w-]+\.png", (index.parent / "js" / "figures.js").read_text()))
    assert in_figures == {"img/e0-pre-0.png", "img/e0-post-0.png", "img/e0-observed.png"}
    for name in in_figures:
        assert (index.parent / name).is_file()
    for t, a in tags_of(index):
        assert t != "img" or a["alt"]


def test_nothing_from_a_catalogue_becomes_markup(tmp_path):
    index = write(tmp_path, case(hostile=True))
    text = index.read_text()
    assert text.count("&lt;script&gt;window.ran") >= 5
    assert "<script>window" not in text
    tags = tags_of(index)
    assert [a["src"] for t, a in tags if t == "script"] == [
        "js/bokeh.min.js",
        "js/report.js",
        "js/figures.js",
    ]
    assert not [a for _, a in tags if any(name.startswith("on") for name in a)]
    assert not [a for _, a in tags if (a.get("href") or "").startswith("javascript")]


def test_unreviewed_and_simulated_are_said(tmp_path):
    c = case()
    text = write(tmp_path, c).read_text()
    assert "UNREVIEWED" in text
    assert "SIMULATED" in text
    real = write(tmp_path, {**c, "lineage": real_lineage(c["lineage"])}).read_text()
    assert "UNREVIEWED" in real
    assert "imulated" not in real


def real_lineage(lineage: Lineage) -> Lineage:
    return dataclasses.replace(lineage, simulated=False)


def test_an_evaluation_is_shown_with_what_was_missed_and_invented(tmp_path):
    c = case()
    truth = gpd.GeoDataFrame(
        geometry=[c["objects"].geometry[0], shapely.box(302_300, 4_798_800, 302_360, 4_798_850)],
        crs="EPSG:32633",
    )
    evaluation = evaluate(c["objects"], truth, inventory=c["inventory"], simulated=True)
    view = EpochView(name="e1", pre=c["view"].pre, post=c["view"].post, evaluation=evaluation)
    text = write(tmp_path, {**c, "view": view}).read_text()
    assert "mapped, and in the simulated truth: 1" in text
    assert "invented (mapped only): 2" in text
    assert "missed (in the simulated truth only): 1" in text
    assert "33.3 %" in text  # of the mapped objects are right
    figures = (tmp_path / "report" / "js" / "figures.js").read_text()
    for layer in ("tp", "fp", "fn"):
        assert f"e0-post-{layer}" in figures


@pytest.mark.parametrize("pictures_too", [True, False])
def test_an_inventory_without_a_landslide_has_a_report(tmp_path, pictures_too):
    c = case(empty=True)
    if not pictures_too:
        c["view"] = EpochView(name="e1")
    text = write(tmp_path, c).read_text()
    assert "<dd>0</dd>" in text
    assert "nan" not in re.sub(r"[a-z-]*nan[a-z]+", "", text.lower())


def test_a_new_report_replaces_the_old_and_a_failed_one_does_not(tmp_path, monkeypatch):
    c = case()
    index = write(tmp_path, c)
    (index.parent / "old.txt").write_text("old")
    write(tmp_path, c)
    assert not (index.parent / "old.txt").exists()
    before = index.read_bytes()

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(page, "render_picture", fail)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path, c)
    assert index.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["report"]


def test_links_are_relative_and_escaped(tmp_path):
    product = tmp_path / "land #slides.parquet"
    product.write_bytes(b"x" * 1234)
    text = write(tmp_path, case(), products={"Objects": product, "Missing": tmp_path / "none"}).read_text()
    assert 'href="../land%20%23slides.parquet"' in text
    assert "1 kB" in text
    assert "Missing" not in text
    assert str(tmp_path) not in text


def test_observed_parts_add_up(monkeypatch):
    c = case()
    whole = numbers.observed_parts(c["inventory"], GEOBOX)
    by = {p.label: p for p in whole.parts}
    aoi = 90 * 100
    assert whole.bounds == (302_000, 4_798_100, 303_000, 4_799_000)  # without the ten columns outside
    assert whole.aoi_km2 == pytest.approx(aoi * 1e-4)
    assert by["not observable"].n_px == 6 * 50
    assert by["observed"].share == whole.share == pytest.approx((aoi - 300) / aoi)
    assert sum(p.share for p in whole.parts) == pytest.approx(1)
    assert {(r.value, r.n_px) for r in whole.reasons} == {(1, 150), (5, 150)}
    monkeypatch.setattr(numbers, "WINDOW_PX", 13)
    assert numbers.observed_parts(c["inventory"].chunk({"y": 20}), GEOBOX) == whole


def test_density_integrates_to_one_and_the_law_has_its_mean():
    areas = np.random.default_rng(0).lognormal(8, 1, 5000)
    centres, density, counts = numbers.size_density(areas, per_decade=10)
    assert counts.sum() == 5000
    widths = centres * (10 ** (1 / 20) - 10 ** (-1 / 20))
    assert (density * widths).sum() == pytest.approx(1)
    a = np.geomspace(133, 1e12, 200_000)  # the law begins at -s
    law = numbers.malamud_density(a)
    assert np.trapezoid(law, a) == pytest.approx(1, abs=0.03)
    assert np.trapezoid(law * a, a) == pytest.approx(3070, rel=0.01)
    below = a < 1000
    assert np.trapezoid(law[below], a[below]) == pytest.approx(0.48, abs=0.03)


def test_size_rows_count_every_object_once():
    rows = numbers.size_rows(np.array([10.0, 999.9, 1000.0, 50_000.0]))
    assert [r.n for r in rows] == [2, 1, 0, 0, 1]
    assert sum(r.share for r in rows) == 1
    assert sum(r.area_share for r in rows) == pytest.approx(1)
    assert [r.n for r in numbers.size_rows(np.empty(0))] == [0] * 5


def test_the_densest_box_holds_the_cluster_and_stays_inside():
    cluster = shapely.points([910, 930, 950, 20], [80, 60, 75, 900])
    objects = gpd.GeoDataFrame(geometry=shapely.buffer(cluster, 5), crs="EPSG:32633")
    box = numbers.densest_box(objects, (0, 0, 1000, 1000), 200)
    assert shapely.box(*box).contains(objects.geometry[0])
    assert shapely.box(0, 0, 1000, 1000).contains(shapely.box(*box))
    assert numbers.densest_box(objects.iloc[:0], (0, 0, 1000, 500), 2000) == (0, 0, 1000, 500)


def test_outlines_are_drawn_where_they_lie_and_only_the_largest(monkeypatch):
    c = case()
    bounds = GEOBOX.boundingbox.bbox
    data = layer_source(c["objects"], bounds).data
    assert data["id"] == sorted(c["objects"]["id"])
    first = data["xs"][0][0]
    assert len(first) == 2  # a shell and its hole
    assert (min(first[0]), max(first[0])) == (100, 180)
    assert (min(data["ys"][0][0][0]), max(data["ys"][0][0][0])) == (-200, -100)
    assert data["slope"] == ["27°"] * 3
    assert data["before"] == ["unknown"] * 3
    assert re.fullmatch(r"43\.\d{4}° N, 12\.\d{4}° E", data["place"][0])
    monkeypatch.setattr("slidecube.pipeline.report.maps.MOST_DRAWN", 2)
    assert len(layer_source(c["objects"], bounds).data["id"]) == 2


def test_overlays_are_small_and_transparent_where_nothing_was_seen(tmp_path):
    pixels = np.full((300, 4100, 3), 90, np.uint8)
    pixels[:, :2050] = 0
    pictures.save_overlay(
        tmp_path / "o.png", Picture(pixels=pixels, geobox=FRAME[:300, :4096].expand((300, 4100)))
    )
    image = Image.open(tmp_path / "o.png")
    assert max(image.size) == 2000
    assert image.getpixel((10, 10))[3] == 0
    assert image.getpixel((1990, 10)) == (90, 90, 90, 255)


def test_the_map_of_what_was_observed_has_its_colours(tmp_path):
    c = case()
    pictures.save_observability(tmp_path / "o.png", c["inventory"], epoch=0)
    image = Image.open(tmp_path / "o.png").convert("RGB")
    assert image.getpixel((5, 5)) == styles.rgb(styles.OBSERVABILITY[3])
    assert image.getpixel((105, 5)) == styles.rgb(styles.OBSERVABILITY[1])
    assert image.getpixel((5, 61)) == styles.rgb(styles.REASONS[1])
    assert image.getpixel((5, 64)) == styles.rgb(styles.REASONS[5])


def test_the_static_picture_is_drawn(tmp_path):
    c = case()
    path = render_picture(
        tmp_path / "p.png",
        inventory=c["inventory"],
        objects=c["objects"],
        view=c["view"],
        title="t",
        simulated=True,
    )
    image = Image.open(path).convert("RGB")
    assert image.width > 1200
    assert styles.rgb(styles.FOUND) in {colour for _, colour in image.getcolors(1 << 24)}


def test_a_picture_of_another_shape_is_refused():
    with pytest.raises(PipelineError, match="give uint8"):
        Picture(pixels=np.zeros((3, 4, 3), np.uint8), geobox=GEOBOX)


@pytest.mark.parametrize(
    ("share", "text"),
    [(None, "-"), (0, "0 %"), (1, "100 %"), (0.5, "50.0 %"), (0.0042, "0.42 %"), (0.00017, "0.017 %"),
     (0.9999, "over 99.9 %")],
)  # fmt: skip
def test_shares_in_words(share, text):
    assert page.percent(share) == text


@pytest.mark.parametrize(
    ("first", "second", "text"),
    [("r1", "r2", "r1 and r2"), ("a + b", "b", "a on the first side only"),
     ("b", "a + b + c", "a, c on the second side only"), ("a + b + d", "b + c", "a, d and c")],
)  # fmt: skip
def test_of_an_edge_only_what_differs_is_named(first, second, text):
    step = EdgeStep(first=1, second=2, pairs=64, step=0.0, error=1.0, across=0.0, inside=0.0)
    edge = Edge(layer="l", variable="VV", kind="overpass", tile="t", first=first, second=second, measured=step,
                seam=False)  # fmt: skip
    assert page.between(edge) == text
    assert page.unit_of(edge) == "dB"


def test_the_ramp_ends_where_it_should_and_darkens():
    assert styles.probability_hex(-1) == styles.PROBABILITY_RAMP[0][1]
    assert styles.probability_hex(2) == styles.PROBABILITY_RAMP[-1][1]
    grey = [sum(styles.probability_rgb(p)) for p in np.linspace(0, 1, 50)]
    assert grey == sorted(grey, reverse=True)
