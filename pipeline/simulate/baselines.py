"""What any detector must be measured against: nothing, slope alone, and an oracle; and the report over seeds."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import rasterio
import xarray as xr
from odc.geo.xr import xr_coords
from rasterio.features import rasterize

from slidecube.catalog.aoi import Aoi
from slidecube.catalog.search import search
from slidecube.catalog.sources import find_source
from slidecube.pipeline.evaluate import Evaluation, evaluate
from slidecube.pipeline.inventory import Observability
from slidecube.pipeline.polygons import pixel_polygons, to_frame
from slidecube.pipeline.simulate.archive import SimulatedArchive, simulate_archive
from slidecube.pipeline.simulate.parameters import load_parameters
from slidecube.pipeline.terrain import terrain_block

_ORACLE_SHARE = 0.5  # a pixel is landslide when most of it is scar
_COLUMNS = ("pixel_f1", "pixel_p", "pixel_r", "object_f1", "object_p", "object_r", "false_per_100_km2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Detection:
    """What a detector says of a simulated archive.

    objects : polygons, any CRS
    observed : (y, x) bool on the archive's GeoBox: judged there and nowhere else; None = everywhere
    """

    objects: gpd.GeoDataFrame
    observed: np.ndarray | None = None


Detector = Callable[[SimulatedArchive], Detection]


def all_negative(archive: SimulatedArchive) -> Detection:
    """Find nothing."""
    return Detection(objects=gpd.GeoDataFrame(geometry=[], crs=str(archive.geobox.crs)))


def slope_only(archive: SimulatedArchive) -> Detection:
    """Call every slope above a fixed angle a landslide, on the DEM that a detector gets."""
    outline = gpd.read_file(archive.aoi)
    source = find_source(str(archive.dem), kind="dem")
    scenes = search(source, Aoi(name="simulated", geometry=outline.geometry.iloc[0]), [], role="dem")
    slope = terrain_block(scenes, archive.geobox)[1]
    return of_mask(archive, slope > load_parameters().slope_only.threshold_deg)


def oracle(archive: SimulatedArchive) -> Detection:
    """Threshold the noise-free share of fresh scar: what mixed pixels alone cost."""
    return of_mask(archive, noise_free(archive)[0] > _ORACLE_SHARE)


def oracle_ndvi(archive: SimulatedArchive) -> Detection:
    """Threshold the noise-free NDVI loss where the truth says it is best: the ceiling of any NDVI threshold."""
    _, before, after, _ = noise_free(archive)
    truth = truth_mask(archive)
    loss = before - after
    cuts = np.arange(0.05, 0.7, 0.025)
    hits = np.array([(truth & (loss > cut)).sum() for cut in cuts])
    called = np.array([(loss > cut).sum() for cut in cuts])
    best = cuts[int(np.argmax(2 * hits / np.maximum(called + truth.sum(), 1)))]
    return of_mask(archive, loss > best)


BASELINES: dict[str, Detector] = {
    "all-negative": all_negative,
    "slope-only": slope_only,
    "oracle": oracle,
    "oracle-ndvi": oracle_ndvi,
}


def noise_free(archive: SimulatedArchive) -> np.ndarray:
    """(4, y, x) float32: share of fresh scar, NDVI before, NDVI after, true elevation."""
    with rasterio.open(archive.oracle) as file:
        return np.asarray(file.read())


def truth_mask(archive: SimulatedArchive) -> np.ndarray:
    """(y, x) bool: pixels whose centre lies in a landslide."""
    shapes = gpd.read_parquet(archive.landslides).geometry
    if shapes.empty:
        return np.zeros(archive.geobox.shape, bool)
    return np.asarray(
        rasterize(shapes, archive.geobox.shape, transform=archive.geobox.affine, dtype="uint8") > 0
    )


def of_mask(archive: SimulatedArchive, landslide: np.ndarray) -> Detection:
    """Make objects of the connected pixels of a mask on the archive's GeoBox."""
    _, parts = pixel_polygons(landslide.astype(np.int32))
    shapes = to_frame(parts, archive.geobox.affine) if len(parts) else parts
    return Detection(objects=gpd.GeoDataFrame(geometry=list(shapes), crs=str(archive.geobox.crs)))


def score(archive: SimulatedArchive, detection: Detection) -> Evaluation:
    """Judge a detection against the archive's truth."""
    observability = np.full(archive.geobox.shape, int(Observability.OBSERVED), np.uint8)
    if detection.observed is not None:
        observability[~detection.observed] = int(Observability.NOT_OBSERVABLE)
    inventory = xr.Dataset({"observability": (("y", "x"), observability)}, coords=xr_coords(archive.geobox))
    truth = gpd.read_parquet(archive.landslides)
    return evaluate(detection.objects, truth, inventory=inventory, simulated=True)


def report(
    detectors: Mapping[str, Detector] | None = None,
    *,
    seeds: Iterable[int] = range(5),
    size: str = "default",
    extent_km: float | None = None,
    overpasses: int | None = None,
    folder: Path | None = None,
) -> pd.DataFrame:
    """Score the baselines and any further detectors on the archives of several seeds.

    detectors : name -> function of the archive, beside BASELINES; the pipeline registers `rdndvi` here
    overpasses : as of `simulate_archive`; 0 is enough for the baselines, which read no scene
    folder : keeps the archives, one a seed; left out, they are thrown away
    Returns one row a seed and detector: F1, precision and recall of pixels and objects (NaN where undefined), and
    false objects per 100 km2.
    """
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for seed in seeds:
            home = (folder or Path(scratch)) / f"seed-{seed}"
            archive = simulate_archive(home, seed=seed, size=size, extent_km=extent_km, overpasses=overpasses)
            for name, detector in {**BASELINES, **(detectors or {})}.items():
                rows.append({"seed": seed, "detector": name} | _row(score(archive, detector(archive))))
    return pd.DataFrame(rows, columns=["seed", "detector", *_COLUMNS])


def _row(result: Evaluation) -> dict[str, float]:
    p, o = result.pixels, result.objects
    values = (p.f1, p.precision, p.recall, o.f1, o.precision, o.recall, result.false_per_100_km2)
    return {
        name: float("nan") if value is None else value for name, value in zip(_COLUMNS, values, strict=True)
    }


def markdown(table: pd.DataFrame) -> str:
    """The report as a table for the documents: each detector's mean over the seeds, and its spread."""
    lines = ["| detector | " + " | ".join(_COLUMNS) + " |", "|---" * (len(_COLUMNS) + 1) + "|"]
    for name in dict.fromkeys(table["detector"]):
        part = table[table["detector"] == name]
        cells = [_cell(part[column]) for column in _COLUMNS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(values: pd.Series[float]) -> str:
    if values.isna().all():
        return "-"
    return f"{values.mean():.3g} ({values.min():.3g} to {values.max():.3g})"
