"""Detectors of the pipeline, run whole on a simulated archive, for the report over seeds."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from slidecube.pipeline.config import load_config
from slidecube.pipeline.demo import archive_toml
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.inventory import Observability
from slidecube.pipeline.open import open_inventory
from slidecube.pipeline.plan import plan
from slidecube.pipeline.report_stage import read_objects
from slidecube.pipeline.run import run
from slidecube.pipeline.run_plan import RunPlan
from slidecube.pipeline.simulate.archive import SimulatedArchive
from slidecube.pipeline.simulate.baselines import Detection, Detector


def rdndvi(archive: SimulatedArchive) -> Detection:
    """Run the pipeline with the parameters of the card, from plan to objects, in the archive's folder."""
    return detection_of(archive, run_model(archive, model="rdndvi"))


def run_model(
    archive: SimulatedArchive,
    *,
    model: str,
    parameters: Mapping[str, float] | None = None,
    settings: Mapping[str, str] | None = None,
) -> RunPlan:
    """Run the pipeline with a model from plan to objects, in the archive's folder; cubes that are there are used.

    parameters : beside those of the card
    settings : of [cube], "mask.readmit" -> a value as TOML writes it, beside those of the archive's TOML
    Returns the plan. Raises PipelineError when the run is incomplete.
    """
    numbers = ", ".join(f"{name} = {value}" for name, value in (parameters or {}).items())
    text = archive_toml(archive).replace(
        'model = "rdndvi"', f'model = "{model}"\nparameters = {{ {numbers} }}'
    )
    toml = archive.root / f"{model}.toml"
    own = "".join(f"{name} = {value}\n" for name, value in (settings or {}).items())
    text = text.replace("[cube]\n", f"[cube]\n{own}")
    # the scores are of the objects; pictures and GeoTIFFs would take as long as the detection
    toml.write_text(f'{text}formats = ["parquet"]\n', encoding="utf-8")
    made = plan(load_config(toml))
    report = run(made, progress=False)
    if not report.complete:
        raise PipelineError(f"The run of {model} on {archive.root} is incomplete: {report.reasons[0]}")
    return made


def detection_of(archive: SimulatedArchive, made: RunPlan) -> Detection:
    """Read what the current run in the archive's folder found, on the archive's pixels."""
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
