"""The cluster sheet in a real browser, from file://, without a network and without scripts."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from affine import Affine
from odc.geo.geobox import GeoBox
from PIL import Image

from slidecube.models.zoo import build_model
from slidecube.pipeline import styles
from slidecube.pipeline.clusters import ClusterBlock, describe_clusters
from slidecube.pipeline.config import DEFAULT_BANDS

BAD = "<img src=x onerror=window.ran=1><script>window.ran=2</script>"
SIDE = 200


def block() -> ClusterBlock:
    """Cluster 0 in the upper half, cluster 1 in the lower, a gap between."""
    clusters = np.full((SIDE, SIDE), 255, np.uint8)
    clusters[:90], clusters[110:] = 0, 1
    layer = xr.Dataset({b: (("y", "x"), np.full((SIDE, SIDE), 2000, np.uint16)) for b in DEFAULT_BANDS})
    return ClusterBlock(
        geobox=GeoBox((SIDE, SIDE), Affine(10, 0, 500_000, 0, -10, 5_000_000), "EPSG:32632"),
        clusters_yx=clusters,
        pre=layer,
        post=layer,
        terrain=xr.Dataset({"slope_deg": (("y", "x"), np.full((SIDE, SIDE), 3000, np.uint16))}),
    )


@pytest.fixture(scope="module")
def sheet(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("statistics")
    patches = np.random.default_rng(0).normal(size=(100, 5, 1, 1)).astype(np.float32)
    describe_clusters(
        folder,
        [block()],
        model=build_model("kmeans-change", parameters={"k": 2}).fit(patches),
        title=f"run{BAD}",
        resolution_m=10.0,
        simulated=True,
    )
    return folder / "sheet" / "index.html"


@pytest.fixture(params=[1400, 380])
def opened(browser, sheet, request):
    """The page, and everything that went wrong or left the machine while it was used."""
    page = browser.new_page(viewport={"width": request.param, "height": 900})
    trouble: list[str] = []
    page.on("console", lambda m: trouble.append(m.text))
    page.on("pageerror", lambda e: trouble.append(str(e)))
    page.on("requestfailed", lambda r: trouble.append(f"failed: {r.url}"))
    page.on("request", lambda r: None if r.url.startswith("file:") else trouble.append(r.url))
    page.goto(sheet.as_uri())
    page.evaluate("document.querySelectorAll('img').forEach(i => i.loading = 'eager')")
    # not wait_for_function, which the page's policy forbids: it evaluates a string in the page
    page.evaluate("Promise.all([...document.images].map(i => i.decode()))")
    yield page
    assert trouble == []
    assert page.evaluate("window.ran") is None
    page.close()


def colour_at(page, down: float) -> tuple[int, ...]:
    """Colour of the map of clusters in its middle, so far down."""
    stack = page.locator(".stack").first
    stack.scroll_into_view_if_needed()
    picture = Image.open(io.BytesIO(stack.screenshot())).convert("RGB")
    found: tuple[int, ...] = picture.getpixel((picture.width // 2, int(picture.height * down)))
    return found


def test_it_opens_says_what_it_is_and_fits_the_screen(opened):
    assert opened.locator("p.banner").inner_text().startswith("SIMULATED")
    assert opened.locator("h1").inner_text() == f"run{BAD}"
    assert "landslide_clusters = {" in opened.locator("#overrule").inner_text()
    assert opened.locator("article.cluster").count() == 2
    assert opened.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_clusters_lie_on_the_map_where_they_are_and_can_be_hidden(opened):
    for k in (0, 1):
        opened.check(f"#show-{k}")
    opened.uncheck("#dim")
    ground = colour_at(opened, 0.5)
    assert colour_at(opened, 0.25) == styles.rgb(styles.CLUSTERS[0])
    assert colour_at(opened, 0.75) == styles.rgb(styles.CLUSTERS[1])
    opened.uncheck("#show-1")
    assert colour_at(opened, 0.25) == styles.rgb(styles.CLUSTERS[0])
    assert colour_at(opened, 0.75) == ground
