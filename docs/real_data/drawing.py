"""Pictures of the document: one look, small files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from PIL import Image

mpl.use("Agg")
from matplotlib import pyplot as plt  # after the backend is chosen

MAX_BYTES = 300_000


def panels(
    count: int, *, rows: int = 1, width: float = 4.0, height: float | None = None
) -> tuple[Any, list[Any]]:
    """Make a figure of equal panels, row by row."""
    columns = -(-count // rows)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(columns * width, rows * (height or width)),
        layout="constrained",
        squeeze=False,
    )
    return figure, list(axes.ravel())


def plain(axis: Any, title: str) -> None:
    """Title a map, without its axes."""
    axis.set_title(title, fontsize=10)
    axis.set(xlabel="", ylabel="")
    axis.set_xticks([])
    axis.set_yticks([])


def true_colour(red: np.ndarray, green: np.ndarray, blue: np.ndarray, *, white: float) -> np.ndarray:
    """Stretch three planes of reflectance to an 8-bit picture; NaN is black."""
    stacked = np.dstack([red, green, blue])
    bright = np.clip(np.nan_to_num(stacked) / white, 0, 1) ** (1 / 1.5)
    picture: np.ndarray = (255 * bright).astype(np.uint8)
    return picture


def stretched(red: np.ndarray, green: np.ndarray, blue: np.ndarray) -> np.ndarray:
    """Stretch each plane from its darkest to its brightest hundredth: without the haze of Level 1C; NaN is black."""
    planes = []
    for plane in (red, green, blue):
        low, high = np.nanpercentile(plane, [1, 99])
        planes.append((plane - low) / max(high - low, 1e-6))
    return true_colour(*planes, white=1.0)


def save(figure: Any, path: Path) -> None:
    """Write a PNG of at most `MAX_BYTES`: in 256 colours, and coarser, where it needs that."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for dpi in (110, 95, 80, 65):
        figure.savefig(path, dpi=dpi, metadata={"Software": None})
        if path.stat().st_size > MAX_BYTES:
            picture = Image.open(path).convert("RGB")
            picture.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(
                path, optimize=True
            )
        if path.stat().st_size <= MAX_BYTES:
            break
    plt.close(figure)
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes; at most {MAX_BYTES} are wanted")
