"""Planning the layers of the TOML: where their rasters lie, refused now where every tile would fail later."""

from __future__ import annotations

import numpy as np

from slidecube.catalog.aoi import Aoi
from slidecube.catalog.errors import CatalogError
from slidecube.catalog.rasters import find_rasters, raster_scene, read_header
from slidecube.catalog.scenes import Scene
from slidecube.pipeline.config import Config, Layer
from slidecube.pipeline.errors import PipelineError


def search_layers(config: Config, tiled: Aoi) -> list[Scene]:
    """Find the rasters of all layers of a TOML over its tiles.

    Raises PipelineError with the layer's name: a file that is missing, has no CRS, covers nothing, or holds numbers of
    another kind than the TOML says.
    """
    scenes: list[Scene] = []
    for layer in config.layers:
        try:
            found = _found(config, layer, tiled)
            _require_kind(layer, found[0])
        except CatalogError as error:
            raise PipelineError(f"Layer {layer.name!r}: {error}") from None
        scenes += found
    return scenes


def _found(config: Config, layer: Layer, tiled: Aoi) -> tuple[Scene, ...]:
    if layer.source is not None:
        return find_rasters(
            config.source(layer.source), tiled, name=layer.name, asset=layer.asset, year=layer.year
        )
    mirrors = [config.place(text) for text in layer.mirrors]
    href = config.place(layer.href or "")
    return (raster_scene(href, tiled, name=layer.name, band=layer.band, mirrors=mirrors, year=layer.year),)


def _require_kind(layer: Layer, scene: Scene) -> None:
    """Look at the first raster: the others of one collection are like it."""
    asset = scene.item["assets"][scene.bands[layer.name]]
    header = read_header(asset["href"], source=scene.source, band=layer.band)
    kind = np.dtype(header.dtype).kind if header.dtype != "complex_int16" else "c"
    where = f"asset {scene.bands[layer.name]!r} of item {scene.id!r}"
    if header.crs is None:
        raise CatalogError(f"{where} has no CRS, so nobody knows where it lies")
    if kind not in ("iu" if layer.kind == "categorical" else "iuf"):
        allowed = "whole numbers" if layer.kind == "categorical" else "real numbers"
        raise CatalogError(
            f"{where} holds {header.dtype}; a {layer.kind} layer holds {allowed}: convert it, or correct kind"
        )
    if (header.scale, header.offset) != (1.0, 0.0):
        raise CatalogError(
            f"{where} holds scaled numbers (x {header.scale:g} + {header.offset:g}); write the values themselves, as "
            "with gdal_translate -unscale"
        )
