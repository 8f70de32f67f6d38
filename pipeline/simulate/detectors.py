"""Detectors of the pipeline, run whole on a simulated archive, for the report over seeds."""

from __future__ import annotations

import numpy as np

from slidecube.pipeline.config import load_config
from slidecube.pipeline.demo import archive_toml
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.inventory import Observability
from slidecube.pipeline.open import open_inventory
from slidecube.pipeline.plan import plan
from slidecube.pipeline.report_stage import read_objects
from slidecube.pipeline.run import run
from slidecube.pipeline.simulate.archive import SimulatedArchive
from slidecube.pipeline.simulate.baselines import Detection, Detector


def rdndvi(archive: SimulatedArchive) -> Detection:
    """Run the pipeline with the parameters of the card, from plan to objects, in the archive's folder."""
    toml = archive.root / "rdndvi.toml"
    toml.write_text(archive_toml(archive), encoding="utf-8")
    made = plan(load_config(toml))
    report = run(made, progress=False)
    if not report.complete:
        raise PipelineError(f"The run on {archive.root} is incomplete: {report.reasons[0]}")
    inventory = open_inventory(archive.root)["observability"].isel(epoch=0)
    x, y = (
        start + step * (np.arange(n) + 0.5)
        for start, step, n in (
            (archive.geobox.affine.c, archive.geobox.affine.a, archive.geobox.shape[1]),
            (archive.geobox.affine.f, archive.geobox.affine.e, archive.geobox.shape[0]),
        )
    )
    seen = inventory.sel(x=x, y=y).to_numpy() == Observability.OBSERVED
    return Detection(objects=read_objects(made), observed=seen)


DETECTORS: dict[str, Detector] = {"rdndvi": rdndvi}
