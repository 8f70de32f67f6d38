"""Clusters in words and pictures: the evidence by which they are named, and the sheet by which a person overrules."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from slidecube.models.naming import ClusterEvidence, Naming, name_landslide_clusters
from slidecube.models.unsupervised import UNKNOWN_CLUSTER, Kmeans
from slidecube.pipeline.cluster_sheet import SheetBlock, SheetFacts, draw_block, write_sheet
from slidecube.pipeline.cluster_statistics import (
    ClusterBlock,
    ClusterStatistics,
    ClusterSummary,
    Distribution,
)
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.run_plan import minimum_size_px
from slidecube.pipeline.storage import Place, replaced, write_atomic

__all__ = ["ClusterBlock", "describe_clusters", "evidence_of"]

CLUSTERS_FILE, SHEET_FOLDER = "clusters.json", "sheet"
_QUARTILES = (0.25, 0.5, 0.75)


def describe_clusters(
    folder: Place,
    blocks: Iterable[ClusterBlock],
    *,
    model: Kmeans,
    title: str,
    resolution_m: float,
    simulated: bool,
) -> Naming:
    """Gather the evidence of every cluster, name the landslide clusters, and write `clusters.json` and the sheet.

    folder : of the statistics, named by their key; exists; a sheet there is replaced when the new one is whole
    blocks : read one after another, each once; at most one is held
    model : fitted; title : of the sheet, any text; resolution_m : side of a pixel
    The files hold no date and no path: equal blocks leave equal bytes.
    Raises PipelineError when no pixel of the blocks has a cluster.
    """
    with replaced(folder / SHEET_FOLDER) as partial:
        (partial / "img").mkdir(parents=True)
        statistics, shown = _read_blocks(partial, blocks, _clusters(model))
        summaries = statistics.summaries()
        minimum_px = minimum_size_px(model.card.min_area_m2, resolution_m)
        shares = model.fitted.shares if model.fitted else ()
        evidence = [
            evidence_of(s, share=shares[s.cluster], pixel_m2=resolution_m**2, minimum_px=minimum_px)
            for s in summaries
        ]
        naming = name_landslide_clusters(evidence)
        facts = SheetFacts(
            title=title,
            fit=folder.name,
            simulated=simulated,
            resolution_m=resolution_m,
            model=model.card.address,
            inputs=model.card.inputs.names,
            patches=model.fitted.patches if model.fitted else 0,
            evidence=tuple(evidence),
        )
        write_sheet(partial, facts, summaries=summaries, naming=naming, blocks=shown)
        write_atomic(folder / CLUSTERS_FILE, _json(facts, summaries, naming, shown))
    return naming


def evidence_of(
    summary: ClusterSummary, *, share: float, pixel_m2: float, minimum_px: int
) -> ClusterEvidence:
    """Say of a cluster what the rule asks for.

    share : of the whole area that it holds; minimum_px : of the objects that the model keeps
    """
    objects = summary.objects
    area_px = objects.area_px(minimum_px)
    return ClusterEvidence(
        cluster=summary.cluster,
        share=share,
        ndvi_pre=_median(summary.ndvi, "pre"),
        ndvi_post=_median(summary.ndvi, "post"),
        dndvi=_median(summary.ndvi, "change"),
        ndwi=_median(summary.colour, "ndwi"),
        brightness=_median(summary.colour, "brightness"),
        slope_deg=summary.slope_deg.median,
        share_below_5_deg=summary.slope_deg.share_below(5.0),
        objects=objects.count(minimum_px),
        object_area_m2=None if area_px is None else area_px * pixel_m2,
        largest_object_share=objects.largest_px / summary.pixels if summary.pixels else None,
        elongation=objects.shape("elongation"),
        downslope=objects.shape("downslope"),
    )


def _median(of: Mapping[str, Distribution], name: str) -> float | None:
    return of[name].median if name in of else None


def _clusters(model: Kmeans) -> int:
    if model.fitted is None:
        raise PipelineError(f"Model {model.card.address} is not fitted; its clusters cannot be described")
    return len(model.fitted.centres)


def _read_blocks(
    partial: Path, blocks: Iterable[ClusterBlock], clusters: int
) -> tuple[ClusterStatistics, list[SheetBlock]]:
    statistics = ClusterStatistics(clusters=clusters)
    shown: list[SheetBlock] = []
    for block in blocks:
        statistics.add(block)
        if (block.clusters_yx != UNKNOWN_CLUSTER).any():
            shown.append(draw_block(partial / "img", len(shown), block, clusters))
    if not shown:
        raise PipelineError(
            "No pixel of the blocks has a cluster; are pre, post and terrain layers done there?"
        )
    return statistics, shown


def _json(
    facts: SheetFacts, summaries: tuple[ClusterSummary, ...], naming: Naming, shown: list[SheetBlock]
) -> str:
    said = {
        "title": facts.title,
        "simulated": facts.simulated,
        "model": facts.model,
        "landslide_clusters": list(naming.clusters),
        "named_by": "rule",
        "blocks": [{"bounds": list(block.bounds), "crs": block.crs} for block in shown],
        "clusters": [
            {
                "cluster": s.cluster,
                "landslide": s.cluster in naming.clusters,
                "score": naming.scores[s.cluster],
                "reason": naming.reasons[s.cluster],
                "share_of_blocks": s.share,
                "evidence": asdict(facts.evidence[s.cluster]),
                "objects": {
                    "cut_share": s.objects.cut_share,
                    "median_m2": _scaled(s.objects.size_px(), facts.resolution_m**2),
                },
                "around": {name: d.median for name, d in s.around.items()},
                "reflectance_quartiles": {
                    side: {band: [s.reflectance(side, band, q) for q in _QUARTILES] for band in bands}
                    for side, bands in s.spectra.items()
                },
            }
            for s in summaries
        ],
    }
    return json.dumps(_rounded(said), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _rounded(value: Any) -> Any:
    """Six digits of every number, which is more than the evidence has; what is not finite is null."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): _rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(v) for v in value]
    return value
