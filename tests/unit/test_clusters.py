"""Evidence of clusters on drawn blocks beside plain numpy, and the sheet as text."""

from __future__ import annotations

import json
import re
import weakref

import numpy as np
import pytest
import xarray as xr
from affine import Affine
from odc.geo.geobox import GeoBox
from PIL import Image

from slidecube.models.zoo import build_model
from slidecube.pipeline.cluster_statistics import ClusterStatistics, Distribution, known_window
from slidecube.pipeline.clusters import ClusterBlock, describe_clusters, evidence_of
from slidecube.pipeline.config import DEFAULT_BANDS
from slidecube.pipeline.errors import PipelineError

BAD = "<script>window.ran=1</script>&amp;"
K = 3


def drawn(seed: int, *, shape=(60, 70), clusters=None, pre=True) -> ClusterBlock:
    """A block of random pixels with gaps of every kind."""
    rng = np.random.default_rng(seed)

    def optical():
        layer = {b: rng.integers(1000, 5000, shape).astype(np.uint16) for b in DEFAULT_BANDS}
        for values in layer.values():
            values[rng.random(shape) < 0.05] = 0
        return xr.Dataset({b: (("y", "x"), v) for b, v in layer.items()})

    slope = rng.integers(0, 6000, shape).astype(np.uint16)
    slope[rng.random(shape) < 0.1] = 65535
    if clusters is None:
        clusters = rng.integers(0, K, shape).astype(np.uint8)
        clusters[rng.random(shape) < 0.1] = 255
    return ClusterBlock(
        geobox=GeoBox(shape, Affine(10, 0, 500_000, 0, -10, 5_000_000), "EPSG:32632"),
        clusters_yx=clusters,
        pre=optical() if pre else None,
        post=optical(),
        terrain=xr.Dataset(
            {
                "slope_deg": (("y", "x"), slope),
                "elevation": (("y", "x"), np.mgrid[: shape[0], : shape[1]][0].astype(np.float32)),
            }
        ),
    )


def summaries(*blocks):
    statistics = ClusterStatistics(clusters=K)
    for block in blocks:
        statistics.add(block)
    return statistics.summaries()


def fitted(name="kmeans-change"):
    patches = np.random.default_rng(0).normal(size=(200, 5, 1, 1)).astype(np.float32)
    return build_model(name, parameters={"k": K}).fit(patches)


def middle(values) -> float:
    return float(np.quantile(values, 0.5, method="inverted_cdf"))


# --- the numbers ------------------------------------------------------------------------------------------------------


def test_medians_are_those_of_numpy_over_all_blocks():
    blocks = [drawn(1), drawn(2, shape=(33, 41))]
    for k, found in enumerate(summaries(*blocks)):
        at = [block.clusters_yx == k for block in blocks]
        assert found.pixels == sum(int(a.sum()) for a in at)
        assert found.share == pytest.approx(found.pixels / sum((b.clusters_yx != 255).sum() for b in blocks))
        for side in ("pre", "post"):
            for band in DEFAULT_BANDS:
                stored = np.concatenate(
                    [getattr(b, side)[band].values[a] for b, a in zip(blocks, at, strict=True)]
                )
                assert found.reflectance(side, band) == (middle(stored[stored != 0]) - 1000) / 10_000
        slope = np.concatenate([b.terrain["slope_deg"].values[a] for b, a in zip(blocks, at, strict=True)])
        assert found.slope_deg.median == pytest.approx(middle(slope[slope != 65535]) / 100)


def test_vegetation_and_its_surroundings_are_those_of_numpy():
    block = drawn(3)
    index = {}
    for side in ("pre", "post"):
        red, nir = (getattr(block, side)[b].values.astype(float) for b in ("B04", "B08"))
        known = (red > 0) & (nir > 0) & (red + nir > 2000)
        with np.errstate(invalid="ignore", divide="ignore"):
            index[side] = np.where(known, np.clip((nir - red) / (red + nir - 2000), -1, 1), np.nan)
    index["change"] = index["post"] - index["pre"]
    y, x = np.mgrid[:60, :70]
    for k, found in enumerate(summaries(block)):
        own = block.clusters_yx == k
        rows, cols = np.nonzero(own)
        distance = np.min(
            [np.hypot(y - r, x - c) for r, c in zip(rows, cols, strict=True)], axis=0
        )  # to the nearest pixel of the cluster
        beside = (distance <= 3.5) & ~own & (block.clusters_yx != 255)
        for name, values in index.items():
            for got, mask in ((found.ndvi[name], own), (found.around[name], beside)):
                want = values[mask & ~np.isnan(values)]
                assert got.n == len(want)
                assert got.median == pytest.approx(middle(want), abs=0.0006)


def test_a_histogram_loses_nothing():
    values = np.random.default_rng(0).integers(0, 9001, 5000)
    found = Distribution(counts=np.bincount(values, minlength=9001), first=0.0, step=0.01)
    edges = np.arange(0, 91, 2.5)
    want, _ = np.histogram(values / 100, edges)
    assert np.allclose(found.binned(edges) * 5000, want)
    beyond = found.binned(np.array([20.0, 30.0, 40.0]))
    assert np.allclose(beyond * 5000, [(values < 3000).sum(), (values >= 3000).sum()])


def test_objects_are_counted_with_their_corners_and_left_out_where_the_edge_cuts_them():
    clusters = np.zeros((40, 40), np.uint8)
    clusters[5:7, 5:13] = 1  # 2 x 8
    clusters[7, 13] = 1  # touches by its corner alone
    clusters[20:24, 20:24] = 1
    clusters[0:3, 30:33] = 1  # cut
    one = summaries(drawn(0, shape=(40, 40), clusters=clusters))[1].objects
    assert sorted(one.size_px_n) == [16, 17]
    assert (list(one.cut_px_m), one.largest_px) == ([9], 17)
    assert one.cut_share == pytest.approx(9 / 42)


def test_elongation_is_length_over_width_whatever_the_direction():
    for shape in ((2, 10), (10, 2)):
        clusters = np.zeros((40, 40), np.uint8)
        clusters[10 : 10 + shape[0], 10 : 10 + shape[1]] = 1
        assert summaries(drawn(0, shape=(40, 40), clusters=clusters))[1].objects.shape(
            "elongation"
        ) == pytest.approx(5)
    clusters = np.where(np.eye(40), 1, 0).astype(np.uint8)
    clusters[:5] = clusters[-5:] = 0
    assert summaries(drawn(0, shape=(40, 40), clusters=clusters))[1].objects.shape("elongation") > 10
    clusters[:] = 0
    clusters[10:12, 10:13] = 1
    assert summaries(drawn(0, shape=(40, 40), clusters=clusters))[1].objects.shape("elongation") is None


def test_sizes_are_those_of_the_area_though_blocks_cut_large_objects():
    rng = np.random.default_rng(7)
    blocks, small, large = [], 0, 0
    for seed in range(
        40
    ):  # two large and two small squares in each hundred of area, anywhere, also across edges
        field = np.zeros((300, 300), np.uint8)
        for side in (3, 40):
            for _ in range(8):
                r, c = rng.integers(0, 300 - side, 2)
                if not field[max(r - 1, 0) : r + side + 1, max(c - 1, 0) : c + side + 1].any():
                    field[r : r + side, c : c + side] = 1
                    inside = 50 <= r < 250 - side and 50 <= c < 250 - side
                    small, large = small + (inside and side == 3), large + (inside and side == 40)
        blocks.append(drawn(seed, shape=(100, 100), clusters=field[100:200, 100:200].copy()))
    one = summaries(*blocks)[1].objects
    is_large = one.size_px_n == 1600
    rate = {3: small / (200 - 3) ** 2, 40: large / (200 - 40) ** 2}
    truth = rate[40] / (rate[3] + rate[40])
    corrected = one.weight_n[is_large].sum() / one.weight_n.sum()
    assert corrected == pytest.approx(truth, abs=0.08)
    assert is_large.mean() < truth - 0.1  # what leaving them out alone would say


def test_only_the_window_that_is_known_counts_as_a_block():
    clusters = np.full((40, 40), 255, np.uint8)
    clusters[10:30, 5:25] = 0
    clusters[10:13, 8:12] = 1  # at the rim of the area: cut
    clusters[15:18, 8:12] = 1
    assert known_window(clusters) == (slice(10, 30), slice(5, 25))
    one = summaries(drawn(0, shape=(40, 40), clusters=clusters))[1].objects
    assert (list(one.size_px_n), list(one.cut_px_m)) == ([12], [12])
    assert one.weight_n[0] == pytest.approx(400 / ((19 - 3) * (19 - 4)))


def test_half_the_area_lies_in_objects_of_a_size_whatever_the_speckle():
    clusters = np.zeros((60, 60), np.uint8)
    clusters[1::4, 1::4] = 1  # 225 single pixels
    clusters[20:30, 20:30] = clusters[40:50, 40:50] = 1
    one = summaries(drawn(0, shape=(60, 60), clusters=clusters))[1].objects
    assert (one.area_px(1), one.area_px(5), one.count(5)) == (1, 100, 2)
    assert one.size_px() == 1
    assert one.area_px(1000) is None


def test_a_background_does_not_look_like_its_crumbs():
    clusters = np.zeros((60, 60), np.uint8)
    clusters[10:50, 10:50] = 1
    clusters[20:24, 20:24] = 0
    zero = summaries(drawn(0, shape=(60, 60), clusters=clusters))[0].objects
    assert list(zero.size_px_n) == [16]
    assert zero.area_px(5) == 2000


@pytest.mark.parametrize(("box", "want"), [((20, 3), 1.0), ((3, 20), 0.0), ("diagonal", 2**-0.5)])
def test_downslope_is_the_angle_to_the_fall_line(box, want):
    clusters = np.zeros((40, 40), np.uint8)
    if box == "diagonal":
        clusters[10:30, 10:30] = np.eye(20)
    else:
        clusters[10 : 10 + box[0], 10 : 10 + box[1]] = 1
    one = summaries(drawn(0, shape=(40, 40), clusters=clusters))[1].objects  # falls towards the first row
    assert one.shape("downslope") == pytest.approx(want, abs=1e-9)


def test_colour_of_the_ground_is_that_of_numpy():
    block = drawn(4)
    blue, green, red, nir = (
        np.where(block.post[b].values == 0, np.nan, (block.post[b].values - 1000.0) / 10_000)
        for b in ("B02", "B03", "B04", "B08")
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        ndwi = np.where(green + nir > 0, (green - nir) / (green + nir), np.nan)
    for k, found in enumerate(summaries(block)):
        own = block.clusters_yx == k
        for name, values in (("ndwi", ndwi), ("brightness", (blue + green + red) / 3)):
            want = values[own & ~np.isnan(values)]
            assert found.colour[name].median == pytest.approx(middle(want), abs=0.0006)


def evidence(summary):
    return evidence_of(summary, share=0.25, pixel_m2=100.0, minimum_px=5)


def test_evidence_is_in_the_units_of_the_rule():
    block = drawn(6, clusters=np.pad(np.ones((6, 10), np.uint8), ((20, 34), (20, 40))))
    found = evidence(summaries(block)[1])
    slope = block.terrain["slope_deg"].values[20:26, 20:30]
    slope = slope[slope != 65535]
    assert (found.share, found.objects, found.object_area_m2) == (0.25, 1, 6000.0)
    assert (found.largest_object_share, found.downslope) == (1.0, pytest.approx(0.0))
    assert found.share_below_5_deg == pytest.approx((slope < 500).mean())


def test_what_is_not_known_is_none():
    block = drawn(0, clusters=np.zeros((60, 70), np.uint8), pre=False)
    block.terrain["slope_deg"][:] = 65535
    found = evidence(summaries(block)[0])
    assert (found.ndvi_pre, found.dndvi, found.slope_deg, found.elongation) == (None, None, None, None)
    assert found.object_area_m2 == 60 * 70 * 100
    missing = evidence(summaries(block)[2])
    assert (missing.ndvi_post, missing.objects, missing.object_area_m2) == (None, 0, None)


# --- the sheet --------------------------------------------------------------------------------------------------------


def described(folder, blocks, *, model=None, title="run-1, epoch e", simulated=False):
    folder.mkdir(exist_ok=True)
    return describe_clusters(
        folder, blocks, model=model or fitted(), title=title, resolution_m=10.0, simulated=simulated
    )


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_equal_blocks_leave_equal_bytes_and_nothing_else(tmp_path):
    folders = [tmp_path / home / "fit" for home in ("a", "b")]  # a sheet names its fit
    for folder in (*folders, folders[1]):  # the second time over what is there
        folder.mkdir(parents=True, exist_ok=True)
        described(folder, [drawn(1), drawn(2)])
    assert files(folders[0]) == files(folders[1])
    assert {p.name for p in folders[0].iterdir()} == {"clusters.json", "sheet"}


def test_one_block_is_held_at_a_time(tmp_path):
    held = []

    def stream():
        for seed in range(4):
            assert not any(reference() is not None for reference in held[:-1])
            block = drawn(seed)
            held.append(weakref.ref(block.clusters_yx))
            yield block
            del block

    described(tmp_path, stream())
    assert len(held) == 4


def test_the_json_says_what_the_rule_saw(tmp_path):
    blocks = [drawn(1), drawn(2)]
    naming = described(tmp_path, blocks, simulated=True)
    said = json.loads((tmp_path / "clusters.json").read_text(encoding="utf-8"))
    assert said["simulated"] is True
    assert said["landslide_clusters"] == list(naming.clusters)
    assert [c["reason"] for c in said["clusters"]] == [naming.reasons[k] for k in range(K)]
    assert sum(c["evidence"]["share"] for c in said["clusters"]) == pytest.approx(1)
    want = summaries(*blocks)[1]
    assert said["clusters"][1]["evidence"]["ndvi_post"] == want.ndvi["post"].median
    low, middle_, high = said["clusters"][1]["reflectance_quartiles"]["pre"]["B08"]
    assert (low, middle_, high) == tuple(want.reflectance("pre", "B08", q) for q in (0.25, 0.5, 0.75))


def test_the_sheet_shows_every_cluster_and_how_to_overrule(tmp_path):
    described(tmp_path, [drawn(1)])
    page = (tmp_path / "sheet" / "index.html").read_text(encoding="utf-8")
    assert f'landslide_clusters = {{ "{tmp_path.name}" = [' in page
    assert "SIMULATED" not in page
    for k in range(K):
        assert f'id="cluster-{k}"' in page
    named = set(re.findall(r'(?:src|href)="([^"#]+)"', page))
    assert named <= {str(p.relative_to(tmp_path / "sheet")) for p in (tmp_path / "sheet").rglob("*")}
    assert {"img/b0-pre.png", "img/b0-post.png", "img/b0-c0.png", "img/c0-change.png"} <= named


def test_it_says_that_data_are_simulated_and_escapes_titles(tmp_path):
    described(tmp_path, [drawn(1)], title=BAD, simulated=True)
    page = (tmp_path / "sheet" / "index.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert page.count("&lt;script&gt;window.ran=1&lt;/script&gt;&amp;amp;") == 2
    assert "SIMULATED" in page


def test_a_single_image_has_no_before(tmp_path):
    described(tmp_path, [drawn(1, pre=False)], model=fitted("kmeans"))
    page = (tmp_path / "sheet" / "index.html").read_text(encoding="utf-8")
    assert "before" not in page.replace("before anything of them was known", "")
    assert not list((tmp_path / "sheet").rglob("*-pre.png"))
    assert not list((tmp_path / "sheet").rglob("*-change.png"))


def test_the_maps_are_the_clusters(tmp_path):
    block = drawn(5)
    described(tmp_path, [block])
    window = known_window(block.clusters_yx)
    for k in range(K):
        picture = Image.open(tmp_path / "sheet" / "img" / f"b0-c{k}.png").convert("RGBA")
        assert np.array_equal(np.asarray(picture)[..., 3] == 255, block.clusters_yx[window] == k)


def test_a_cluster_that_no_block_holds_is_said_to_be_missing(tmp_path):
    described(tmp_path, [drawn(1, clusters=np.zeros((60, 70), np.uint8))])
    assert "No pixel of the blocks is in it" in (tmp_path / "sheet" / "index.html").read_text(
        encoding="utf-8"
    )


@pytest.mark.parametrize(
    ("blocks", "model", "message"),
    [
        ([], None, "No pixel of the blocks has a cluster"),
        ([drawn(1, clusters=np.full((60, 70), 255, np.uint8))], None, "No pixel of the blocks has a cluster"),
        ([drawn(1, clusters=np.full((60, 70), K, np.uint8))], None, "holds cluster 3; there are 0 to 2"),
        ([drawn(1, clusters=np.zeros((9, 9), np.uint8))], None, "are .9, 9. pixels"),
        ([drawn(1)], build_model("kmeans"), "is not fitted"),
    ],
)
def test_what_cannot_be_described_is_refused_and_leaves_nothing(tmp_path, blocks, model, message):
    with pytest.raises(PipelineError, match=message):
        described(tmp_path, blocks, model=model)
    assert list(tmp_path.iterdir()) == []
