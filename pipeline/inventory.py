"""The inventory's Zarr group: its vocabulary, its CF and GeoZarr metadata, and reading it as stored.

Dimensions are (epoch, y, x). Everything is a small integer; CF attributes say how to read it as numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import IntEnum
from typing import Any

import numpy as np
import pyproj
import xarray as xr
import zarr
from affine import Affine
from numpy.typing import NDArray
from odc.geo.geobox import GeoBox

from slidecube.models.card import PROBABILITY_STEP
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.storage import Place, zarr_store

PROBABILITY_SCALE = PROBABILITY_STEP
PROBABILITY_NODATA = 65535
LANDSLIDE_NODATA = 255
VARIABLES = ("probability", "spread", "landslide", "observability", "reason")


class Observability(IntEnum):
    """What can be said of a pixel; "no landslide" is `landslide == 0` where OBSERVED and nowhere else."""

    NOT_PROCESSED = 0
    OUTSIDE_AOI = 1
    NOT_OBSERVABLE = 2
    OBSERVED = 3


class Reason(IntEnum):
    """Why a pixel is not observable, as the `reason` byte says it."""

    NONE = 0
    NO_CLEAR_PRE = 1
    NO_CLEAR_POST = 2
    NO_CLEAR_PRE_NOR_POST = 3
    NO_TERRAIN = 4
    INDEX_UNDEFINED = 5
    NO_RADAR = 6
    RADAR_LAYOVER = 7
    RADAR_SHADOW = 8
    MISREGISTERED = 9
    SNOW = 10
    LOW_SUN = 11
    CAST_SHADOW = 12


REASONS: dict[int, str] = {
    0: "none",
    1: "no clear observation before the event",
    2: "no clear observation after the event",
    3: "no clear observation, neither before nor after the event",
    4: "no terrain",
    5: "vegetation index undefined (water, rock, snow)",
    6: "no radar observation on one side of the event",
    7: "radar layover",
    8: "radar shadow",
    9: "images before and after the event do not lie on each other",
    10: "no clear date on one side of the event: snow",
    11: "no clear date on one side of the event: sun too low",
    12: "no clear date on one side of the event: terrain shadow",
}
"""Why a pixel is not observable, by the value of the `reason` byte."""

CF: dict[str, dict[str, Any]] = {
    "probability": {
        "long_name": "probability of a landslide",
        "units": "1",
        "scale_factor": PROBABILITY_SCALE,
        "add_offset": 0.0,
        "_FillValue": PROBABILITY_NODATA,
        "valid_range": [0, 10000],
    },
    "spread": {
        "long_name": "spread of the probability between the ensemble's members",
        "units": "1",
        "scale_factor": PROBABILITY_SCALE,
        "add_offset": 0.0,
        "_FillValue": PROBABILITY_NODATA,
        "valid_range": [0, 10000],
    },
    "landslide": {
        "long_name": "landslide, of at least the smallest mapped area",
        "_FillValue": LANDSLIDE_NODATA,
        "flag_values": [0, 1],
        "flag_meanings": "no_landslide landslide",
    },
    "observability": {
        "long_name": "what can be said of the pixel",
        "flag_values": [int(o) for o in Observability],
        "flag_meanings": " ".join(o.name.lower() for o in Observability),
    },
    "reason": {
        "long_name": "why the pixel is not observable",
        "flag_values": [int(r) for r in Reason],
        "flag_meanings": " ".join(r.name.lower() for r in Reason),
    },
}
"""CF attributes of the variables. Source: CF conventions 1.11, sections 2.5, 3.5 and 8.1."""

CONVENTIONS: list[dict[str, str]] = [
    {
        "schema_url": "https://raw.githubusercontent.com/zarr-experimental/geo-proj/refs/tags/v1/schema.json",
        "spec_url": "https://github.com/zarr-experimental/geo-proj/blob/v1/README.md",
        "uuid": "f17cb550-5864-4468-aeb7-f3180cfb622f",
        "name": "proj:",
        "description": "Coordinate reference system information for geospatial data",
    },
    {
        "schema_url": "https://raw.githubusercontent.com/zarr-conventions/spatial/refs/tags/v1/schema.json",
        "spec_url": "https://github.com/zarr-conventions/spatial/blob/v1/README.md",
        "uuid": "689b58e2-cf7b-45e0-9fff-9cfc0883d6b4",
        "name": "spatial:",
        "description": "Spatial coordinate information",
    },
]
"""The Zarr conventions that the group follows, as their registries name them."""


@contextmanager
def reading(path: Place, remedy: str = "remove it, and what it held is made anew") -> Iterator[None]:
    """Name a damaged store in one line; the libraries say what they stumbled over, but not where."""
    try:
        yield
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise PipelineError(
            f"Store {path} is damaged ({' '.join(str(error).split())[:160]}); {remedy}"
        ) from None


def finish_inventory(path: Place, *, geobox: GeoBox, epochs: Sequence[str]) -> None:
    """Give an inventory its coordinates, grid mapping and attributes, so that any CF or GeoZarr reader places it.

    path : Zarr v3 group of (epoch, y, x) arrays, written already; nothing of their data is touched
    geobox : pixels of the arrays; epochs : names, in the order of the epoch dimension
    Doing it again changes nothing.
    Raises PipelineError when an array's shape is not that of the epochs and the GeoBox.
    """
    group = zarr.open_group(zarr_store(path), mode="r+", use_consolidated=False)
    names = [name for name in VARIABLES if name in group]
    shape = (len(epochs), *geobox.shape)
    for name in names:
        array = group[name]
        assert isinstance(array, zarr.Array)
        if array.shape != shape:
            raise PipelineError(f"{path.name}/{name} has shape {array.shape}; epochs and grid say {shape}")
        array.attrs.update({**CF[name], "grid_mapping": "spatial_ref", "coordinates": "spatial_ref"})
    centre_y = geobox.affine.f + geobox.affine.e * (np.arange(geobox.shape[0]) + 0.5)
    centre_x = geobox.affine.c + geobox.affine.a * (np.arange(geobox.shape[1]) + 0.5)
    _coordinate(group, "y", centre_y, {"standard_name": "projection_y_coordinate", "units": "m", "axis": "Y"})
    _coordinate(group, "x", centre_x, {"standard_name": "projection_x_coordinate", "units": "m", "axis": "X"})
    _coordinate(group, "epoch", np.array(epochs, dtype=np.dtypes.StringDType()), {"long_name": "epoch"})
    _spatial_ref(group, geobox)
    group.attrs.update({"Conventions": "CF-1.11", "zarr_conventions": CONVENTIONS, **geozarr_attrs(geobox)})


def geozarr_attrs(geobox: GeoBox) -> dict[str, Any]:
    """Attributes of the GeoZarr conventions `spatial:` and `proj:`, version 1."""
    a, crs = geobox.affine, geobox.crs
    assert crs is not None
    code = {} if crs.epsg is None else {"proj:code": f"EPSG:{crs.epsg}"}
    return {
        "spatial:dimensions": ["y", "x"],
        "spatial:transform_type": "affine",
        "spatial:transform": [a.a, a.b, a.c, a.d, a.e, a.f],
        "spatial:shape": list(geobox.shape),
        "spatial:bbox": list(geobox.boundingbox.bbox),
        "spatial:registration": "pixel",
        "proj:wkt2": pyproj.CRS.from_user_input(str(crs)).to_wkt(),
        **code,
    }


def open_stored(path: Place) -> xr.Dataset:
    """Open an inventory lazily, with its values as they are stored."""
    with reading(path):
        inventory: xr.Dataset = xr.open_zarr(
            zarr_store(path), consolidated=False, mask_and_scale=False, chunks={}
        )
    return inventory


def stored(inventory: xr.Dataset, name: str, *, epoch: int = 0) -> xr.DataArray:
    """Return one variable of one epoch as it is stored, whether the Dataset was opened decoded or not.

    Returns (y, x), uint16 or uint8, lazy where the Dataset is.
    Raises PipelineError when there is no such variable.
    """
    if name not in inventory:
        known = ", ".join(str(v) for v in inventory.data_vars)
        raise PipelineError(f"The inventory has no variable {name!r}; it has {known}")
    array: xr.DataArray = inventory[name]
    array = array.isel(epoch=epoch) if "epoch" in array.dims else array
    if array.dtype.kind != "f":
        return array
    cf = CF[name]
    dtype = np.uint16 if "scale_factor" in cf else np.uint8
    counts: xr.DataArray = (array / cf.get("scale_factor", 1)).round()
    return counts.fillna(cf["_FillValue"]).astype(dtype).assign_attrs(cf)


def geobox_of(inventory: xr.Dataset) -> GeoBox:
    """Pixels of an opened inventory, from its attributes, else from its coordinates.

    Raises PipelineError when neither says where it lies.
    """
    attrs: Mapping[Any, Any] = inventory.attrs
    sizes = (inventory.sizes["y"], inventory.sizes["x"])
    if "spatial_ref" in inventory.coords and "x" in inventory.coords:
        x, y = inventory["x"].to_numpy(), inventory["y"].to_numpy()
        ref = inventory["spatial_ref"].attrs
        gt = [float(v) for v in str(ref["GeoTransform"]).split()]
        affine = Affine(gt[1], 0, float(x[0]) - gt[1] / 2, 0, gt[5], float(y[0]) - gt[5] / 2)
        return GeoBox(sizes, affine, ref["crs_wkt"])
    if "spatial:transform" in attrs and tuple(attrs["spatial:shape"]) == sizes:
        return GeoBox(sizes, Affine(*attrs["spatial:transform"]), attrs.get("proj:code", attrs["proj:wkt2"]))
    raise PipelineError(
        "The inventory does not say where it lies; it needs spatial_ref with x and y, or spatial:"
    )


def epochs_of(inventory: xr.Dataset) -> tuple[str, ...]:
    """Names of the epochs; a Dataset without an epoch dimension has one without a name."""
    if "epoch" not in inventory.dims:
        return (str(inventory["epoch"].item()) if "epoch" in inventory.coords else "",)
    return tuple(str(name) for name in inventory["epoch"].to_numpy())


def _spatial_ref(group: zarr.Group, geobox: GeoBox) -> None:
    a = geobox.affine
    crs = pyproj.CRS.from_user_input(str(geobox.crs))
    attrs = {
        **crs.to_cf(),
        "spatial_ref": crs.to_wkt(),
        "GeoTransform": " ".join(repr(float(v)) for v in (a.c, a.a, a.b, a.f, a.d, a.e)),
    }
    if "spatial_ref" not in group:
        group.create_array("spatial_ref", shape=(), dtype="int64", fill_value=0, dimension_names=())
    group["spatial_ref"].attrs.update(attrs)


def _coordinate(group: zarr.Group, name: str, values: NDArray[Any], attrs: dict[str, str]) -> None:
    if name not in group:
        fill: Any = "" if values.dtype.kind == "T" else 0
        dtype = "string" if values.dtype.kind == "T" else values.dtype
        group.create_array(
            name,
            shape=values.shape,
            chunks=values.shape,
            dtype=dtype,
            fill_value=fill,
            dimension_names=(name,),
        )
    array = group[name]
    assert isinstance(array, zarr.Array)
    array[:] = values
    array.attrs.update(attrs)
