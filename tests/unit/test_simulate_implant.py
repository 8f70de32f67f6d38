"""Scars laid into real pixels: nothing else changes, and the truth is where the change is."""

from __future__ import annotations

import datetime as dt
import json

import geopandas as gpd
import numpy as np
import pytest
import rasterio
import shapely
import xarray as xr
from affine import Affine
from odc.geo.geobox import GeoBox
from odc.geo.xr import wrap_xr
from rasterio.features import rasterize

from slidecube.catalog.sources import offset_of
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.simulate import implant, into, simulate_archive
from slidecube.pipeline.simulate.implant import draw_scars, lay, reclassify
from slidecube.pipeline.simulate.light import Sun

EVENT = dt.date(2020, 6, 1)


def ridges(shape: tuple[int, int]) -> np.ndarray:
    """Valleys and ridges of 30 to 40 degrees: terrain for places whose own DEM is not at hand."""
    y, x = np.indices(shape)
    return (600 + 110 * np.sin(x / 17) * np.cos(y / 23) + 40 * np.sin(y / 9)).astype(np.float32)


@pytest.fixture(scope="module")
def inn_valley(shared_data):
    """Real Sentinel-2 pixels of two dates (red, green, blue, near infrared)."""
    with rasterio.open(shared_data / "inn_valley_two_dates" / "inference-img.tif") as file:
        values = file.read().astype(np.float32) / 1e4
        geobox = GeoBox(file.shape, file.transform, str(file.crs))
    times = np.array(["2020-04-01", "2020-07-15"], dtype="datetime64[ns]")
    return xr.Dataset(
        {
            band: wrap_xr(np.stack([values[i], values[i + 4]]), geobox, time=times)
            for i, band in enumerate(("B04", "B03", "B02", "B08"))
        }
    )


@pytest.fixture(scope="module")
def implanted(inn_valley):
    return implant(inn_valley, ridges(inn_valley.odc.geobox.shape), event=EVENT, seed=1)


def near(truth: gpd.GeoDataFrame, geobox: GeoBox, metres: float) -> np.ndarray:
    grown = [shape for shape in truth.buffer(metres) if not shape.is_empty]
    return rasterize(grown, geobox.shape, transform=geobox.affine, dtype="uint8") > 0


def test_real_pixels_change_at_the_scars_and_nowhere_else(inn_valley, implanted):
    cube, truth = implanted
    geobox = inn_valley.odc.geobox
    assert len(truth) > 10
    for band in ("B02", "B03", "B04", "B08"):
        before, after = inn_valley[band].to_numpy(), cube[band].to_numpy()
        assert np.array_equal(before[0], after[0])  # the scene before the event
        changed = before[1] != after[1]
        assert changed.any()
        assert not (changed & ~near(truth, geobox, 40)).any()
        assert changed[near(truth, geobox, -8)].all()


def test_scars_lower_the_index_of_green_ground(inn_valley, implanted):
    cube, truth = implanted

    def ndvi(c):
        red, nir = c["B04"].to_numpy()[1], c["B08"].to_numpy()[1]
        return (nir - red) / (nir + red)

    inside = near(truth, inn_valley.odc.geobox, -8) & (ndvi(inn_valley) > 0.7)
    assert inside.sum() > 50
    drop = (ndvi(inn_valley) - ndvi(cube))[inside]
    assert 0.25 < drop.mean() < 0.75  # Kaikoura's scars: .355 +- .215, on ground of .64
    assert ndvi(cube)[inside].mean() < 0.5


def test_truth_is_inside_the_scene_and_exact(inn_valley, implanted):
    _, truth = implanted
    assert truth.crs.to_epsg() == 32633
    assert np.allclose(truth["area_m2"], truth.area)
    assert shapely.box(*inn_valley.odc.geobox.boundingbox).contains(shapely.union_all(truth.geometry))
    assert {"event", "background"} >= set(truth["kind"])


def test_flat_flanders_takes_no_landslide(shared_data):
    """The real DEM of site 31UDS has no slope that could fail: refuse, do not invent."""
    with rasterio.open(shared_data / "worldcereal_series" / "site_31UDS" / "dem_31UDS.tif") as file:
        dem, geobox = file.read(1).astype(np.float32), GeoBox(file.shape, file.transform, str(file.crs))
    with pytest.raises(PipelineError, match="No landslide fits here: the steepest slope is"):
        draw_scars(dem, geobox, EVENT)


@pytest.fixture(scope="module")
def scars():
    geobox = GeoBox((300, 300), Affine(10, 0, 500000, 0, -10, 5000000), "EPSG:32633")
    return draw_scars(ridges(geobox.shape), geobox, EVENT, seed=2)


def flat(geobox, value=0.05):
    return np.full(geobox.shape, value, np.float32)


def test_clouds_hide_scars_and_shadow_darkens_them(scars):
    day = dt.date(2020, 6, 10)
    clear = lay(
        scars, "B04", flat(scars.geobox), scars.geobox, day, scl=np.full(scars.geobox.shape, 4, np.uint8)
    )
    cloud = lay(
        scars, "B04", flat(scars.geobox), scars.geobox, day, scl=np.full(scars.geobox.shape, 9, np.uint8)
    )
    shade = lay(
        scars, "B04", flat(scars.geobox), scars.geobox, day, scl=np.full(scars.geobox.shape, 3, np.uint8)
    )
    assert np.array_equal(cloud, flat(scars.geobox))
    inside = near(scars.truth, scars.geobox, -8)
    assert clear[inside].mean() > 0.09
    assert shade[inside].mean() < 0.6 * clear[inside].mean()


def test_scars_fade_and_do_not_precede_the_event(scars):
    def change(day):
        return np.abs(lay(scars, "B04", flat(scars.geobox), scars.geobox, day) - 0.05).sum()

    assert change(EVENT - dt.timedelta(days=1)) == 0
    assert change(EVENT) > change(EVENT + dt.timedelta(days=400)) > 0


def test_the_20_m_band_sees_the_same_scar_area(scars):
    """Light is kept: the sum over the pixels, times their area, is that of the 10 m band with the same spectrum."""
    coarse = scars.geobox.zoom_out(2)
    fine = lay(scars, "B11", flat(scars.geobox, 0), scars.geobox, EVENT)
    rough = lay(scars, "B11", flat(coarse, 0), coarse, EVENT)
    assert rough.sum() * 400 == pytest.approx(fine.sum() * 100, rel=0.02)


def test_slopes_away_from_the_sun_are_darker(scars):
    dark = lay(
        scars, "B08", flat(scars.geobox, 0), scars.geobox, EVENT, sun=Sun(elevation_deg=25, azimuth_deg=90)
    )
    other = lay(
        scars, "B08", flat(scars.geobox, 0), scars.geobox, EVENT, sun=Sun(elevation_deg=25, azimuth_deg=270)
    )
    east = np.gradient(scars.dem_m)[1]
    inside = near(scars.truth, scars.geobox, -8)
    facing_west = inside & (east > 3)
    assert facing_west.any()
    assert other[facing_west].mean() > dark[facing_west].mean()


def test_fresh_bright_scars_become_bare_or_cloud(scars):
    scl = np.full(scars.geobox.shape, 4, np.uint8)
    made = {
        red: reclassify(scars, scl, flat(scars.geobox, red), scars.geobox, EVENT)[
            near(scars.truth, scars.geobox, -12)
        ]
        for red in (0.09, 0.24)
    }
    assert set(np.unique(made[0.09])) <= {4, 5}
    assert (made[0.24] == 8).mean() > 0.5


def test_cube_without_band_or_crs_is_refused(scars):
    cube = xr.Dataset({"B04": wrap_xr(flat(scars.geobox), scars.geobox)})
    with pytest.raises(PipelineError, match="no band to implant into: VV"):
        implant(cube.rename(B04="VV"), scars.dem_m, event=EVENT)
    with pytest.raises(PipelineError, match="no CRS"):
        implant(xr.Dataset({"B04": (("y", "x"), flat(scars.geobox))}), scars.dem_m, event=EVENT)
    with pytest.raises(PipelineError, match="No scar spectrum for band 'B10'"):
        lay(scars, "B10", flat(scars.geobox), scars.geobox, EVENT)
    with pytest.raises(PipelineError, match="shape"):
        draw_scars(scars.dem_m[:-1], scars.geobox, EVENT)


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory):
    """A catalogue of scenes (simulated ones, here in the place of real ones) before its own event."""
    root = tmp_path_factory.mktemp("into")
    archive = simulate_archive(root / "source", size="small", extent_km=2.4, overpasses=3)
    with rasterio.open(archive.oracle) as file:
        profile, dem = file.profile, file.read(4)
    with rasterio.open(root / "dem.tif", "w", **{**profile, "count": 1, "driver": "GTiff"}) as file:
        file.write(dem, 1)
    made = into(archive.optical, root / "out", event=dt.date(2018, 7, 1), dem=root / "dem.tif", seed=5)
    return archive, root / "out", made


def test_into_writes_a_catalogue_with_scars_after_the_event(catalogue):
    archive, out, made = catalogue
    truth = gpd.read_parquet(out / "truth" / "landslides.parquet")
    assert made == out / "archive" / "catalog.json"
    items = [
        json.loads(p.read_text()) | {"_at": p.parent}
        for p in sorted((out / "archive" / "scenes").glob("*/*.json"))
    ]
    assert len(items) == len(list(archive.optical.parent.glob("*/*.json")))
    changed = 0
    for item in items:
        original = next(archive.optical.parent.glob(f"*/{item['id'].removesuffix('_SIMULATED_SCARS')}.json"))
        after = item["properties"]["datetime"] >= "2018-07-01"
        assert item["id"].endswith("_SIMULATED_SCARS") == after
        assert item["properties"]["slidecube:simulated"] is after
        assert offset_of({k: v for k, v in item.items() if k != "_at"}).value in (0.0, -0.1)
        for key in ("B04", "B11", "SCL"):
            with (
                rasterio.open(item["_at"] / item["assets"][key]["href"]) as new,
                rasterio.open(original.parent / f"{key}.tif") as old,
            ):
                a, b = old.read(1), new.read(1)
                geobox = GeoBox(new.shape, new.transform, str(new.crs))
            if not after:
                assert np.array_equal(a, b)
                continue
            assert not ((a != b) & ~near(truth, geobox, 100)).any()
            changed += int((a != b).sum())
    assert changed > 100


def test_into_wants_a_scene_after_the_event(catalogue, tmp_path):
    archive, _, _ = catalogue
    dem = archive.root.parent / "dem.tif"
    with pytest.raises(PipelineError, match="on or after the event"):
        into(archive.optical, tmp_path, event=dt.date(2030, 1, 1), dem=dem)
    with pytest.raises(PipelineError, match="meet less than 32 pixels"):
        into(archive.optical, tmp_path, event=dt.date(2018, 7, 1), dem=dem, bounds=(0, 0, 10, 10))
