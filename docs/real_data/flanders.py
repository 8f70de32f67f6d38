"""A real series from plan to report: site 31UDS in Flanders, two autumns, and numpy beside the stored composites."""

from __future__ import annotations

import datetime as dt
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import drawing
import geopandas as gpd
import numpy as np
import scipy.ndimage
import xarray as xr
from odc.geo.geobox import GeoBox
from rasterio.transform import from_origin
from rasterio.warp import transform_geom

from slidecube.pipeline.indices import ndvi, relative_difference
from slidecube.pipeline.open import open_inventory, open_plan
from slidecube.pipeline.run_plan import RunPlan
from slidecube.pipeline.store import read_window

EPOCH = "autumn"
PRE, POST = ("2017-08-01", "2017-11-30"), ("2018-08-01", "2018-11-30")
METHODS = ("greenest", "median")
MAX_CLOUD_PCT = 80.0
BANDS = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")
MASKED, WIDENED, WIDEN_PX = (0, 1, 3, 8, 9, 10, 11), (3, 8, 9, 10), 3
TOML = """\
[area]
aoi = "area.geojson"
crs = "EPSG:32631"

[[epoch]]
name = "{epoch}"
pre = ["{pre[0]}", "{pre[1]}"]
post = ["{post[0]}", "{post[1]}"]

[sources]
optical = "items.json"
dem = "items.json"

[cube]
composite = "{method}"
greenest_of = 0
tile_px = 512
# what the classification alone says: numpy's side knows nothing else
mask = {{ cloud_heights_m = [], readmit = false }}

[output]
workspace = "{method}"
"""


def measure(shared: Path, scratch: Path, images: Path | None = None) -> dict[str, Any]:
    """Wrap the series, run it through the command line with both composites, and compare with numpy.

    Returns numbers as JSON takes them; with `images`, the picture is drawn, too.
    """
    found: dict[str, Any] = {"series": _series(shared), "methods": {}}
    for method in METHODS:
        toml = prepare(shared, scratch, method)
        for verb, argument in (("plan", toml), ("run", toml), ("report", scratch / method)):
            command_line(verb, argument)
        found["methods"][method] = judge(shared, scratch / method, method)
    if images is not None:
        _draw(shared, scratch / "greenest", images / "real-flanders.png")
    return found


def prepare(shared: Path, scratch: Path, method: str) -> Path:
    """Write catalogue, area and TOML of a run; returns the TOML."""
    if not (scratch / "items.json").exists():
        wrap_module().wrap(shared, scratch)
        _write_area(scratch / "area.geojson")
    toml = scratch / f"{method}.toml"
    toml.write_text(TOML.format(epoch=EPOCH, pre=PRE, post=POST, method=method), encoding="utf-8")
    return toml


def command_line(verb: str, argument: Path) -> str:
    """Run one verb of the command line in a process of its own; anything but exit code 0 is an error."""
    code = "from slidecube.pipeline.cli import main; main()"
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", code, verb, str(argument)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"slidecube {verb} left with {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def wrap_module() -> ModuleType:
    """Import the script that wraps the series, from the tests."""
    path = Path(__file__).resolve().parents[2] / "tests" / "data" / "wrap_site_31uds.py"
    spec = importlib.util.spec_from_file_location("wrap_site_31uds", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def site() -> GeoBox:
    """The 64 x 64 pixels of the series."""
    wrap = wrap_module()
    return GeoBox((64, 64), from_origin(wrap.LEFT, wrap.TOP, 10, 10), "EPSG:32631")


# --- the oracle: the same composites from the NetCDF arrays, by numpy and scipy ----------------------------------


def expected(shared: Path, window: tuple[str, str], method: str) -> dict[str, np.ndarray]:
    """Composite of a window, from the arrays of the series alone.

    Returns (y, x) uint16 a variable, as slidecube stores them.
    """
    ten, twenty = wrap_module().open_series(shared)
    used = np.flatnonzero(searched(ten, twenty, window))
    scl = np.repeat(np.repeat(twenty["SCL"].values[used], 2, 1), 2, 2)
    side = 2 * WIDEN_PX + 1
    wide = scipy.ndimage.binary_dilation(np.isin(scl, WIDENED), np.ones((1, side, side), bool))
    cube = np.stack([_on_10_m(ten, twenty, band)[used] for band in BANDS]).astype(float)
    valid = ~np.isin(scl, MASKED) & ~wide & (cube != 0).all(axis=0)
    cube[:, ~valid] = np.nan
    days = ten["timestamp"].values[used].astype("datetime64[D]").astype(int)
    made = {"clear_count": valid.sum(axis=0)}
    made["date_first"] = np.where(valid.any(0), np.where(valid, days[:, None, None], 99_999).min(0), 0)
    made["date_last"] = np.where(valid, days[:, None, None], 0).max(0)
    if method == "median":
        reduced = np.nanmedian(cube, axis=1)
        made["date"] = np.zeros(valid.shape[1:])
    else:
        red, nir = cube[BANDS.index("B04")], cube[BANDS.index("B08")]
        best = np.where(valid, (nir - red) / (nir + red), -np.inf).argmax(axis=0)
        reduced = np.take_along_axis(cube, best[None, None], axis=1)[:, 0]
        made["date"] = np.where(valid.any(0), days[best], 0)
    made |= dict(zip(BANDS, np.nan_to_num(np.rint(reduced + 1000)), strict=True))
    return {name: values.astype(np.uint16) for name, values in made.items()}


def searched(ten: xr.Dataset, twenty: xr.Dataset, window: tuple[str, str]) -> np.ndarray:
    """Which dates the plan may use: in the window, and at most 80 per cent cloud over the site."""
    day = ten["timestamp"].values.astype("datetime64[D]")
    cloud_pct = 100 * np.isin(twenty["SCL"].values, (8, 9, 10)).mean(axis=(1, 2))
    found: np.ndarray = (
        (day >= np.datetime64(window[0])) & (day <= np.datetime64(window[1])) & (cloud_pct <= MAX_CLOUD_PCT)
    )
    return found


def _on_10_m(ten: xr.Dataset, twenty: xr.Dataset, band: str) -> np.ndarray:
    """A band on 10 m pixels: as it is, or by bilinear weights of 1/4 and 3/4, halves rounded up as GDAL does."""
    if band in ten:
        values: np.ndarray = ten[band].values
        return values
    wide = twenty[band].values.astype(float)
    if (wide == 0).any():
        raise ValueError(f"{band} holds nodata; this oracle has no weights for it")
    for axis in (1, 2):
        before = np.take(wide, np.maximum(np.arange(wide.shape[axis]) - 1, 0), axis)
        after = np.take(wide, np.minimum(np.arange(wide.shape[axis]) + 1, wide.shape[axis] - 1), axis)
        pair = np.stack([0.25 * before + 0.75 * wide, 0.75 * wide + 0.25 * after], axis=axis + 1)
        wide = pair.reshape([n * (2 if i == axis else 1) for i, n in enumerate(wide.shape)])
    rounded: np.ndarray = np.floor(wide + 0.5)
    return rounded


# --- what slidecube stored ---------------------------------------------------------------------------------------


def stored(plan: RunPlan, layer: str, names: list[str]) -> dict[str, np.ndarray]:
    """Read variables of a layer over the site."""
    box = site()
    row, col = plan.grid.offset_px(box)
    window = (slice(row, row + box.shape[0]), slice(col, col + box.shape[1]))
    return read_window(plan.workspace.layer(plan.grid, layer), names, window=window)


def judge(shared: Path, workspace: Path, method: str) -> dict[str, Any]:
    """Compare what a run left with numpy, and count what it found."""
    plan = open_plan(workspace)
    epoch = plan.epochs[0]
    compared = differing = 0
    composites = {}
    for layer, window in ((epoch.pre, PRE), (epoch.post, POST)):
        want = expected(shared, window, method)
        got = stored(plan, layer, list(want))
        compared += sum(values.size for values in want.values())
        differing += sum(int((got[name] != values).sum()) for name, values in want.items())
        composites[window] = want
    rule = _rule(plan, composites[PRE], composites[POST])
    inventory = open_inventory(workspace).isel(epoch=0)
    objects = gpd.read_parquet(plan.workspace.products(plan.inventory) / "landslides.parquet")
    page = plan.workspace.products(plan.inventory) / "report" / "index.html"
    return {
        "values_compared": compared,
        "values_differing": differing,
        "clear_count": {
            side: [
                int(v) for v in np.percentile(composites[w]["clear_count"], [0, 50, 100], method="nearest")
            ]
            for side, w in (("pre", PRE), ("post", POST))
        },
        **rule,
        "observed_px": int((inventory["observability"] == 3).sum()),
        "not_observable_px": int((inventory["observability"] == 2).sum()),
        "landslide_px": int((inventory["landslide"] == 1).sum()),
        "landslides": len(objects),
        "report_written": page.is_file(),
    }


def _rule(plan: RunPlan, pre: dict[str, np.ndarray], post: dict[str, np.ndarray]) -> dict[str, Any]:
    """What each half of the rule says of the pixels of the site, from numpy's composites."""
    change_pct = change(pre, post)
    slope = slopes(plan)
    parameters = plan.model.card.parameters
    lost, steep = change_pct <= -parameters["loss_pct"], slope >= parameters["slope_deg"]
    known = ~np.isnan(slope)
    return {
        "px": int(change_pct.size),
        "slope_known_px": int(known.sum()),
        "slope_median_deg": round(float(np.nanmedian(slope)), 2),
        "slope_max_deg": round(float(np.nanmax(slope)), 2),
        "ndvi_flagged_px": int(lost.sum()),
        "ndvi_flagged_pct": round(100 * float(lost.mean()), 1),
        "steep_px": int(steep.sum()),
        "both_px": int((lost & steep).sum()),
        "loss_limit_pct": parameters["loss_pct"],
        "slope_limit_deg": parameters["slope_deg"],
    }


def change(pre: dict[str, np.ndarray], post: dict[str, np.ndarray]) -> np.ndarray:
    """Relative change of NDVI, per cent."""
    sides = [
        ndvi(*((side[band].astype(float) - 1000) / 10_000 for band in ("B04", "B08"))) for side in (pre, post)
    ]
    return relative_difference(sides[0], sides[1])


def slopes(plan: RunPlan) -> np.ndarray:
    """Slope over the site, degrees, NaN = none."""
    raw = stored(plan, plan.epochs[0].terrain, ["slope_deg"])["slope_deg"]
    return np.where(raw == 65535, np.nan, raw / 100)


def _series(shared: Path) -> dict[str, Any]:
    ten, twenty = wrap_module().open_series(shared)
    day = ten["timestamp"].values.astype("datetime64[D]")
    cloud_pct = 100 * np.isin(twenty["SCL"].values, (8, 9, 10)).mean(axis=(1, 2))
    found: dict[str, Any] = {
        "dates": len(day),
        "first": str(day.min()),
        "last": str(day.max()),
        "wholly_cloudy": int((cloud_pct == 100).sum()),
        "max_cloud_pct": MAX_CLOUD_PCT,
    }
    for side, window in (("pre", PRE), ("post", POST)):
        inside = (day >= np.datetime64(window[0])) & (day <= np.datetime64(window[1]))
        found[side] = {
            "window": list(window),
            "days": (dt.date.fromisoformat(window[1]) - dt.date.fromisoformat(window[0])).days + 1,
            "dates": int(inside.sum()),
            "used": int(searched(ten, twenty, window).sum()),
        }
    return found


def _write_area(path: Path) -> None:
    ring = [list(corner) for corner in site().extent.geom.exterior.coords]
    shape = transform_geom("EPSG:32631", "EPSG:4326", {"type": "Polygon", "coordinates": [ring]})
    path.write_text(json.dumps({"type": "Feature", "properties": {}, "geometry": shape}), encoding="utf-8")


def _draw(shared: Path, workspace: Path, path: Path) -> None:
    plan = open_plan(workspace)
    pre, post = (expected(shared, window, "greenest") for window in (PRE, POST))
    figure, axes = drawing.panels(4, width=3.4, height=3.9)
    for axis, side, title in ((axes[0], pre, "before: autumn 2017"), (axes[1], post, "after: autumn 2018")):
        planes = [(side[band].astype(float) - 1000) / 10_000 for band in ("B04", "B03", "B02")]
        axis.imshow(drawing.true_colour(*planes, white=0.18))
        drawing.plain(axis, f"{title}, greenest pixel")
    change_pct = change(pre, post)
    limit = plan.model.card.parameters["loss_pct"]
    shown = axes[2].imshow(change_pct, cmap="BrBG", vmin=-60, vmax=60)
    axes[2].contour(change_pct <= -limit, levels=[0.5], colors="crimson", linewidths=0.8)
    drawing.plain(axes[2], f"relative change of NDVI, %\nred: below -{limit:g} %")
    figure.colorbar(shown, ax=axes[2], location="bottom", shrink=0.8)
    shown = axes[3].imshow(slopes(plan), cmap="viridis", vmin=0, vmax=plan.model.card.parameters["slope_deg"])
    drawing.plain(axes[3], "slope, degrees\nscale ends at the rule's limit")
    figure.colorbar(shown, ax=axes[3], location="bottom", shrink=0.8)
    drawing.save(figure, path)
