"""What is fitted of a plan, and what it was fitted to: light enough for `status`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.run_plan import EpochPlan, RunPlan
from slidecube.pipeline.statistics import MANIFEST, SHEET, frozen_digest, read_manifest
from slidecube.pipeline.tasks import layer_ledger


def unfitted(made: RunPlan) -> list[EpochPlan]:
    """List the epochs whose statistics the model needs and that are not frozen yet."""
    return [
        epoch
        for epoch in made.epochs
        if epoch.stat_key and not frozen_digest(made.workspace.statistics(epoch.stat_key))
    ]


def contributing(plan: RunPlan, epoch: EpochPlan) -> set[str]:
    """Tiles all of whose layers are done."""
    return _tiles_where(plan, epoch, lambda known, key: known == (key, True))


def tried(plan: RunPlan, epoch: EpochPlan) -> set[str]:
    """Tiles each of whose layers has a record under the plan's key, of success or failure."""
    return _tiles_where(plan, epoch, lambda known, key: known is not None and known[0] == key)


def _tiles_where(
    plan: RunPlan, epoch: EpochPlan, holds: Callable[[tuple[str, bool] | None, str], bool]
) -> set[str]:
    found = set(plan.tiles.keys)
    for name in epoch.layers:
        known, keys = layer_ledger(plan, name).keys(), plan.keys[name]
        found = {tile for tile in found if holds(known.get(tile), keys[tile])}
    return found


def thaw(plan: RunPlan) -> None:
    """Forget what was frozen for a plan, so that it is fitted again.

    Raises PipelineError when the configuration names the statistics: others may use them.
    """
    if plan.config.fit.statistics:
        raise PipelineError(
            "[fit] statistics names an earlier fit, which stays as it is; leave it out to fit again"
        )
    for epoch in plan.epochs:
        if epoch.stat_key:
            (plan.workspace.statistics(epoch.stat_key) / MANIFEST).unlink(missing_ok=True)


def fit_state(made: RunPlan, epoch: EpochPlan) -> dict[str, Any]:
    """Say what was fitted for an epoch.

    Returns {"epoch", "key", "frozen", "clusters": landslide clusters in use, "named_by": "rule", "person" or "",
    "reasons": of the rule by cluster, "repaired_tiles": tiles that were made or mended after the freeze, "sheet",
    "strata": image -> {"fitted", "take the whole"}, {} without strata, "seams": steps where they meet}.
    """
    folder = made.workspace.statistics(epoch.stat_key)
    manifest = read_manifest(folder)
    chosen = (made.config.detect.landslide_clusters or {}).get(epoch.stat_key)
    clusters = chosen if chosen is not None else manifest.get("clusters", ())
    later = contributing(made, epoch) - set(manifest["contributed"]) if manifest else set()
    return {
        "epoch": epoch.name,
        "key": epoch.stat_key,
        "frozen": bool(manifest),
        "clusters": list(clusters),
        "named_by": "" if "clusters" not in manifest else "rule" if chosen is None else "person",
        "reasons": dict(manifest.get("reasons", {})),
        "repaired_tiles": sorted(later) if not made.config.fit.statistics else [],
        "strata": dict(manifest.get("strata", {})),
        "seams": dict(manifest.get("seams", {})),
        "sheet": str(folder / SHEET) if (folder / SHEET).is_file() else "",
    }
