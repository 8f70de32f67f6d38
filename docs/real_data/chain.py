"""The unsupervised chain on arrays in memory: MNF, features, auto-encoder and k-means, and the rule that names.

It is what the pipeline's fit stage does, for scenes that are no Level 2A items. Axes: n patch, f feature, y, x.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xarray as xr
from affine import Affine
from odc.geo.geobox import GeoBox

from slidecube.models.naming import Naming, name_landslide_clusters
from slidecube.models.unsupervised import Kmeans, predict_clusters
from slidecube.models.zoo import build_model
from slidecube.pipeline.cluster_statistics import ClusterBlock, ClusterStatistics, ClusterSummary
from slidecube.pipeline.clusters import evidence_of
from slidecube.pipeline.composite import SCALE, SHIFT, reflectance
from slidecube.pipeline.indices import ndvi
from slidecube.pipeline.mnf import Mnf, fit_mnf, merge, moments
from slidecube.pipeline.terrain import SLOPE_NODATA, SLOPE_SCALE

MOST_PATCHES = 60_000
"""Patches that are learnt from; of fewer pixels, all are."""

VARIANTS = {
    "kmeans": ("kmeans", {}),
    "cae deep": ("cae-kmeans", {"deep_and_inputs": 0.0}),
    "cae deep + inputs": ("cae-kmeans", {"deep_and_inputs": 1.0}),
}
"""Label -> model and its parameters, beside the cards' own; "-change" is appended for two images."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Layers of one place, as slidecube stores them; pre is None for a single image."""

    post: xr.Dataset
    terrain: xr.Dataset
    pre: xr.Dataset | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a variant made of scenes: a map of clusters each, and what the rule says of them."""

    model: Kmeans
    maps: tuple[np.ndarray, ...]
    summaries: tuple[ClusterSummary, ...]
    naming: Naming

    def to_dict(self) -> dict[str, Any]:
        """Numbers for the document."""
        rows = []
        for s in self.summaries:
            change = s.ndvi["change"].median if "change" in s.ndvi else None
            rows.append(
                {
                    "cluster": s.cluster,
                    "share_pct": round(100 * s.share, 1),
                    "ndvi": _rounded(s.ndvi["post"].median, 2) if s.ndvi else None,
                    "change": _rounded(change, 2),
                    "slope_deg": _rounded(s.slope_deg.median, 1),
                    "score": round(self.naming.scores[s.cluster], 3),
                }
            )
        losses = self.model.fitted.losses if self.model.fitted else ()
        loss = round(losses[-1], 3) if losses else None
        return {"named": list(self.naming.clusters), "loss": loss, "clusters": rows}


def stored_bands(planes: dict[str, np.ndarray]) -> xr.Dataset:
    """Reflectances as slidecube stores them; NaN is nodata."""
    layers = {}
    for band, values in planes.items():
        scaled = np.clip(np.rint(SCALE * np.nan_to_num(values)) + SHIFT, 1, 65535)
        layers[band] = (("y", "x"), np.where(np.isnan(values), 0, scaled).astype(np.uint16))
    return xr.Dataset(layers)


def stored_terrain(slope_deg: np.ndarray, elevation_m: np.ndarray) -> xr.Dataset:
    """Slope and heights as slidecube stores them; NaN is nodata."""
    hundredths = np.rint(np.nan_to_num(slope_deg) / SLOPE_SCALE)
    return xr.Dataset(
        {
            "slope_deg": (
                ("y", "x"),
                np.where(np.isnan(slope_deg), SLOPE_NODATA, hundredths).astype(np.uint16),
            ),
            "elevation": (("y", "x"), elevation_m.astype(np.float32)),
        }
    )


def image(scene: Scene, bands: Sequence[str]) -> xr.Dataset:
    """Bands whose MNF is wanted, on the stored scale: of the single image, or post minus pre; NaN = unknown."""
    post, pre = (
        None if side is None else {b: side[b].astype(np.float32).where(side[b] != 0) for b in bands}
        for side in (scene.post, scene.pre)
    )
    assert post is not None
    return xr.Dataset(post if pre is None else {b: post[b] - pre[b] for b in bands})


def fit(scenes: Sequence[Scene], bands: Sequence[str]) -> Mnf:
    """One MNF over all scenes."""
    return fit_mnf(merge([moments(image(scene, bands)) for scene in scenes]), bands=bands)


def spectrum(mnf: Mnf) -> dict[str, Any]:
    """Eigenvalues and their shares of the sum, as the paper's Table 3 prints them."""
    return {
        "bands": len(mnf.bands),
        "eigenvalues": [round(v, 2) for v in mnf.eigenvalues],
        "first_three": round(sum(mnf.shares[:3]), 3),
    }


def cluster(scenes: Sequence[Scene], mnf: Mnf, variant: str, *, pixel_m: float = 10.0) -> Found:
    """Learn from all scenes together, map each, and ask the rule."""
    name, parameters = VARIANTS[variant]
    change = scenes[0].pre is not None
    model = build_model(f"{name}-change" if change else name, parameters=parameters)
    assert isinstance(model, Kmeans)
    features = [_features(scene, mnf, model) for scene in scenes]
    fitted = model.fit(_patches(features, model.card.window_px))
    maps = tuple(predict_clusters(fitted, f)["cluster"].values for f in features)
    statistics = ClusterStatistics(clusters=len(fitted.fitted.centres))
    for scene, found in zip(scenes, maps, strict=True):
        box = GeoBox(found.shape, Affine(pixel_m, 0, 0, 0, -pixel_m, 0), "EPSG:32633")
        statistics.add(
            ClusterBlock(geobox=box, clusters_yx=found, pre=scene.pre, post=scene.post, terrain=scene.terrain)
        )
    summaries = statistics.summaries()
    minimum_px = max(int(np.ceil(fitted.card.min_area_m2 / pixel_m**2)), 1)
    naming = name_landslide_clusters(
        [
            evidence_of(s, share=fitted.fitted.shares[s.cluster], pixel_m2=pixel_m**2, minimum_px=minimum_px)
            for s in summaries
        ]
    )
    return Found(model=replace(fitted), maps=maps, summaries=summaries, naming=naming)


def _features(scene: Scene, mnf: Mnf, model: Kmeans) -> xr.Dataset:
    side = "post" if scene.pre is None else "change"
    made = dict(mnf.transform(image(scene, mnf.bands), suffix=side, components=3).data_vars)
    index = [
        ndvi(reflectance(layer["B04"]), reflectance(layer["B08"]))
        for layer in (scene.pre, scene.post)
        if layer is not None
    ]
    made["ndvi_post"] = index[-1]
    if scene.pre is not None:
        made["dndvi"] = index[1] - index[0]
    slope = scene.terrain["slope_deg"]
    made["slope_deg"] = (slope * np.float32(SLOPE_SCALE)).where(slope != SLOPE_NODATA)
    return xr.Dataset({name: made[name].astype(np.float32) for name in model.card.inputs.names})


def _patches(features: Sequence[xr.Dataset], window_px: int) -> np.ndarray:
    """Windows about known pixels of all scenes; at most `MOST_PATCHES`, drawn with a fixed seed."""
    context, taken = window_px // 2, []
    for f in features:
        stack_fyx = np.pad(
            np.stack([f[name].values for name in f]),
            ((0, 0), (context, context), (context, context)),
            constant_values=np.nan,
        )
        windows = np.lib.stride_tricks.sliding_window_view(stack_fyx, (window_px, window_px), axis=(1, 2))
        y, x = np.nonzero(np.isfinite(windows[..., context, context]).all(axis=0))
        taken.append(windows[:, y, x].swapaxes(0, 1))
    patches = np.concatenate(taken)
    if len(patches) > MOST_PATCHES:
        chosen = np.random.default_rng(0).choice(len(patches), MOST_PATCHES, replace=False)
        patches = patches[np.sort(chosen)]
    return np.ascontiguousarray(patches)


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
