"""Curves of a training: its history as Parquet and for TensorBoard, and a picture of its best and worst patches."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from slidecube.models.training_state import Row
from slidecube.models.weights import write_whole

COLUMNS = pa.schema(
    [
        ("epoch", pa.int32()),
        ("iteration", pa.int64()),
        ("loss", pa.float64()),
        ("learning_rate", pa.float64()),
        ("validation_loss", pa.float64()),
        ("precision", pa.float64()),
        ("recall", pa.float64()),
        ("f1", pa.float64()),
        ("threshold", pa.float64()),
        ("seconds", pa.float64()),
    ]
)
"""One row an epoch, counted from 1: mean loss of its steps, rate of its last one, and validation at its own best
threshold; seconds of training and validation, which alone differ from run to run."""


def write_history(path: Path, rows: Sequence[Row]) -> None:
    """Write the epochs so far, whole or not at all."""
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=COLUMNS), out)
    write_whole(path, out.getvalue())
