"""Real Landslide4Sense patches: the published chain on single images, for the eye. Figures only; no pixel is copied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import chain
import drawing
import h5py
import numpy as np
from matplotlib.patches import Patch

from slidecube.pipeline import styles

BANDS = {"B02": 1, "B03": 2, "B04": 3, "B05": 4, "B06": 5, "B07": 6, "B08": 7, "B11": 10, "B12": 11}
"""Bands that the MNF takes, and where they lie: B8A is not among the fourteen, B09 and B10 see air and no ground."""
DIVISORS = (
    1111.81,
    824.63,
    663.42,
    445.17,
    645.86,
    1547.74,
    1960.44,
    1941.32,
    674.08,
    9.048,
    1113.98,
    519.90,
    20.292,
    772.83,
)
"""By which the authors divided the channels (Landslide4Sense-2022, issue 4)."""  # fmt: skip
SLOPE, HEIGHT = 12, 13
LABELLED = "image_1"


def measure(shared: Path, scratch: Path, images: Path | None = None) -> dict[str, Any]:
    """One MNF and one model over all patches; the maps beside the ground, and one mask."""
    del scratch
    names, scenes = read(shared)
    mask = read_mask(shared)
    mnf = chain.fit(scenes, tuple(BANDS))
    found = {variant: chain.cluster(scenes, mnf, variant) for variant in chain.VARIANTS}
    at = names.index(LABELLED)
    numbers = {
        "patches": len(scenes),
        "spectrum": chain.spectrum(mnf),
        "mask_px": int(mask.sum()),
        "variants": {
            variant: f.to_dict() | {"mask_px": _counts(f, at, mask), "patch_px": _counts(f, at, mask >= 0)}
            for variant, f in found.items()
        },
    }
    if images is not None:
        _draw_labelled(scenes[at], mask, found, at, images / "real-patch-mask.png")
        _draw_all(names, scenes, found, images / "real-patches.png")
    return numbers


def read(shared: Path) -> tuple[list[str], list[chain.Scene]]:
    """Read all patches that have bands, in the order of their numbers."""
    folder = shared / "landslide4sense_samples"
    paths = [folder / f"{LABELLED}.h5", *sorted((folder / "images").glob("*.h5"))]
    return [path.stem for path in paths], [_scene(path) for path in paths]


def read_mask(shared: Path) -> np.ndarray:
    """Read the mask of `LABELLED`: (y, x) uint8, 1 = landslide."""
    with h5py.File(shared / "landslide4sense_samples" / "mask_1.h5") as file:
        mask: np.ndarray = file["mask"][:]
    return mask


def spectra(shared: Path) -> dict[str, Any]:
    """Eigenvalues of the one MNF."""
    return chain.spectrum(chain.fit(read(shared)[1], tuple(BANDS)))


def _scene(path: Path) -> chain.Scene:
    with h5py.File(path) as file:
        values = file["img"][:] * np.array(DIVISORS)
    return chain.Scene(
        post=chain.stored_bands({band: values[..., i] / 10_000 for band, i in BANDS.items()}),
        terrain=chain.stored_terrain(np.clip(values[..., SLOPE], 0, 90), values[..., HEIGHT]),
    )


def _counts(found: chain.Found, at: int, mask: np.ndarray) -> list[int]:
    """Pixels of each cluster of one patch where a mask is set."""
    return [int(((found.maps[at] == s.cluster) & (mask == 1)).sum()) for s in found.summaries]


def _photo(axis: Any, scene: chain.Scene, title: str) -> None:
    planes = [(scene.post[b].values - 1000.0) / 10_000 for b in ("B04", "B03", "B02")]
    axis.imshow(drawing.stretched(*planes))
    drawing.plain(axis, title)


def _clusters(axis: Any, found: chain.Found, at: int, title: str) -> None:
    colours = np.array([styles.rgb(c) for c in styles.CLUSTERS], np.uint8)
    axis.imshow(colours[found.maps[at]], interpolation="nearest")
    named = ", ".join(map(str, found.naming.clusters)) or "none"
    drawing.plain(axis, f"{title}\nnamed landslide: {named}")


def _draw_labelled(
    scene: chain.Scene, mask: np.ndarray, found: dict[str, chain.Found], at: int, path: Path
) -> None:
    figure, axes = drawing.panels(5, width=3.0, height=3.9)
    _photo(axes[0], scene, "image_1, true colour\n ")
    slope = scene.terrain["slope_deg"].values / 100
    axes[1].imshow(slope, cmap="Greys", vmin=0, vmax=60)
    axes[1].contour(mask, levels=[0.5], colors="crimson", linewidths=1)
    drawing.plain(axes[1], "slope (darker is steeper)\nred: the mask")
    for axis, (variant, one) in zip(axes[2:], found.items(), strict=True):
        _clusters(axis, one, at, variant)
        axis.contour(mask, levels=[0.5], colors="black", linewidths=1)
        axis.legend(
            handles=[Patch(color=styles.CLUSTERS[s.cluster], label=str(s.cluster)) for s in one.summaries],
            loc="upper center",
            bbox_to_anchor=(0.5, -0.02),
            ncols=5,
            frameon=False,
            handlelength=1,
            columnspacing=1,
        )
    drawing.save(figure, path)


def _draw_all(names: list[str], scenes: list[chain.Scene], found: dict[str, chain.Found], path: Path) -> None:
    figure, axes = drawing.panels(3 * len(scenes), rows=6, width=2.0, height=2.25)
    for i, (name, scene) in enumerate(zip(names, scenes, strict=True)):
        row, side = divmod(i, 2)
        _photo(axes[6 * row + 3 * side], scene, f"{name}\n ")
        for column, variant in enumerate(("kmeans", "cae deep + inputs"), start=1):
            _clusters(axes[6 * row + 3 * side + column], found[variant], i, variant)
    drawing.save(figure, path)
