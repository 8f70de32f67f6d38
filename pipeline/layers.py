"""What is stored: the variables of every layer and of the inventory, and the arrays that a plan needs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from slidecube.pipeline.auxiliary import dtype_of, nodata_of
from slidecube.pipeline.config import Layer
from slidecube.pipeline.ground import GROUND_CF
from slidecube.pipeline.inventory import (
    CF,
    LANDSLIDE_NODATA,
    PROBABILITY_NODATA,
    Observability,
    finish_inventory,
)
from slidecube.pipeline.masks import SNOW_NODATA
from slidecube.pipeline.radar import DB_PER_STEP, DB_SHIFT
from slidecube.pipeline.radar_layer import ANGLE_NODATA, MASK_NODATA
from slidecube.pipeline.run_plan import LAND_COVER, RunPlan
from slidecube.pipeline.store import Variable, create_arrays
from slidecube.pipeline.terrain import TERRAIN_VARIABLES
from slidecube.pipeline.topography import ILLUMINATION
from slidecube.pipeline.visibility import CAST_SHADOW, LOW_SUN

_DAYS = {"units": "days since 1970-01-01", "long_name": "date", "comment": "0 = none"}


_HIDDEN = {
    "long_name": "what alone hid the pixel on one of its dates",
    "flag_masks": [LOW_SUN, CAST_SHADOW],
    "flag_meanings": "low_sun cast_shadow",
}


def _terrain_variables(names: Iterable[str]) -> dict[str, Variable]:
    made = {}
    for name in names:
        one = TERRAIN_VARIABLES[name]
        scale = {} if one.dtype == "float32" else {"scale_factor": one.scale}
        attrs = {"units": one.unit, "long_name": one.formula, "source": one.source, **scale}
        made[name] = Variable(dtype=one.dtype, fill=one.nodata, attrs=attrs)
    return made


_BACKSCATTER = {
    "units": "dB",
    "scale_factor": DB_PER_STEP,
    "add_offset": -DB_SHIFT * DB_PER_STEP,
    "long_name": "backscatter, median of the window",
}
_SEEN = {"flag_values": [0, 1], "comment": "1 = on every track; 255 = no scene looked"}
RADAR = {
    "VV": Variable(dtype="uint16", fill=0, attrs=_BACKSCATTER),
    "VH": Variable(dtype="uint16", fill=0, attrs=_BACKSCATTER),
    "count": Variable(dtype="uint16", fill=0, attrs={"units": "1", "long_name": "number of observations"}),
    "date_first": Variable(dtype="uint16", fill=0, attrs=_DAYS),
    "date_last": Variable(dtype="uint16", fill=0, attrs=_DAYS),
    "lia_deg": Variable(
        dtype="uint16",
        fill=ANGLE_NODATA,
        attrs={"units": "degree", "scale_factor": 0.01, "long_name": "local incidence angle"},
    ),
    "layover": Variable(dtype="uint8", fill=MASK_NODATA, attrs={"long_name": "radar layover", **_SEEN}),
    "shadow": Variable(dtype="uint8", fill=MASK_NODATA, attrs={"long_name": "radar shadow", **_SEEN}),
}
"""Stored variables of a radar layer."""

INVENTORY = {
    "probability": Variable(dtype="uint16", fill=PROBABILITY_NODATA, attrs=CF["probability"]),
    "spread": Variable(dtype="uint16", fill=PROBABILITY_NODATA, attrs=CF["spread"]),
    "landslide": Variable(dtype="uint8", fill=LANDSLIDE_NODATA, attrs=CF["landslide"]),
    "observability": Variable(dtype="uint8", fill=Observability.NOT_PROCESSED, attrs=CF["observability"]),
    "reason": Variable(dtype="uint8", fill=0, attrs=CF["reason"]),
    "ground": Variable(dtype="uint8", fill=0, attrs=GROUND_CF),
}
"""Stored variables of an inventory, each (epoch, y, x)."""


def _optical_variables(made: RunPlan) -> dict[str, Variable]:
    band = {"units": "1", "scale_factor": 1e-4, "add_offset": -0.1, "long_name": "surface reflectance"}
    bands = {str(name): Variable(dtype="uint16", fill=0, attrs=band) for name in made.config.cube.bands}
    count = Variable(
        dtype="uint16", fill=0, attrs={"units": "1", "long_name": "number of clear observations"}
    )
    dates = {
        name: Variable(dtype="uint16", fill=0, attrs=_DAYS) for name in ("date_first", "date_last", "date")
    }
    spread = Variable(
        dtype="uint16",
        fill=0,
        attrs={
            "units": "1",
            "scale_factor": 1e-4,
            "add_offset": -1e-4,
            "long_name": "median distance of the clear observations from the composite, reflectance",
            "comment": "0 = fewer than two clear observations",
        },
    )
    snow = Variable(
        dtype="uint8",
        fill=SNOW_NODATA,
        attrs={"units": "%", "long_name": "share of the overpasses that called the pixel snow"},
    )
    series = {
        "ndvi_mean": ("mean of NDVI over the clear observations", -1.0001),
        "ndvi_std": ("standard deviation of NDVI over the clear observations", -0.0001),
    }
    of_series = {
        name: Variable(
            dtype="uint16",
            fill=0,
            attrs={
                "units": "1",
                "scale_factor": 1e-4,
                "add_offset": series[name][1],
                "long_name": series[name][0],
            },
        )
        for name in made.series_variables()
    }
    hidden = Variable(dtype="uint8", fill=0, attrs=_HIDDEN)
    observed = {"clear_count": count, **dates, "spread": spread, "snow_pct": snow, "hidden": hidden}
    light = Variable(
        dtype="uint16",
        fill=0,
        attrs={
            "units": "1",
            "scale_factor": 1e-4,
            "add_offset": -1.0001,
            "long_name": "cosine of the angle between sun and ground, mean over the clear observations",
        },
    )
    lit = {ILLUMINATION: light} if made.config.cube.sun.correction != "none" else {}
    return {**bands, **observed, **of_series, **lit}


def _auxiliary_variables(layer: Layer, made: RunPlan) -> dict[str, Variable]:
    year = {"slidecube:year": layer.year} if layer.year else {}
    attrs: dict[str, Any] = {
        "units": layer.units,
        "long_name": layer.name,
        "slidecube:resampling": layer.kernel,
        **year,
    }
    if layer is LAND_COVER and made.points is not None:
        names = made.points.names
        words = " ".join(re.sub(r"\W+", "_", name) for name in names.values())
        attrs = {
            "long_name": "land cover before the event",
            "flag_values": list(names),
            "flag_meanings": words,
        }
    return {layer.name: Variable(dtype=dtype_of(layer), fill=nodata_of(layer), attrs=attrs)}


def create_stores(made: RunPlan) -> None:
    """Make the arrays that are missing; what is there stays."""
    frame = made.grid.frame
    tile_px, block_px = made.grid.tile_px, made.grid.block_px
    by_kind = {
        "terrain": _terrain_variables(made.terrain_variables()),
        "radar": RADAR,
        "optical": _optical_variables(made),
    }
    for layer in made.layers:
        own = made.layer_settings(layer.name)
        variables = by_kind[layer.kind] if own is None else _auxiliary_variables(own, made)
        attrs = {"slidecube:layer_key": layer.key, "slidecube:window": str(layer.window or "")}
        if layer.orbit:
            attrs["slidecube:orbit"] = layer.orbit
        path = made.workspace.layer(made.grid, layer.name)
        create_arrays(path, variables, geobox=frame, tile_px=tile_px, block_px=block_px, attrs=attrs)
    extent = frame[made.tiles.roi]
    inventory = made.workspace.inventory(made.inventory)
    create_arrays(
        inventory,
        INVENTORY,
        geobox=extent,
        tile_px=tile_px,
        block_px=block_px,
        leading={"epoch": len(made.epochs)},
        attrs={
            "slidecube:run": made.run,
            "slidecube:grid": made.grid.key,
            "slidecube:tile_px": tile_px,
            "slidecube:first_tile": [int(made.tiles.rows.min()), int(made.tiles.cols.min())],
            "slidecube:model": made.card.address,
        },
    )
    finish_inventory(inventory, geobox=extent, epochs=[e.name for e in made.epochs])
