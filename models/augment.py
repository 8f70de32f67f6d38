"""Patches varied as the ground could have varied them: labels follow, and nothing unknown becomes known.

Each function is pure: (x_fyx, y_yx, names, rng) -> (x_fyx, y_yx), in the features' own units, NaN = unknown; what it is
given is never written to.
Axes: f feature, y row from north to south, x column from west to east.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
from scipy import ndimage

from slidecube.models.patches import IGNORE, LANDSLIDE, STABLE, UNLABELLED
from slidecube.models.train_settings import AugmentSettings

Sample = tuple[np.ndarray, np.ndarray]

_INDEX = r"(r?d)?(ndvi|ndwi|ndmi|nbr|bsi|savi|tcb|tcg|tcw)(_(mean_|std_)?(pre|post))?"
_OPTICAL = re.compile(rf"B\w\w(_pre|_post)?|l4s_B\w+|mnf\d+_(pre|post|change)|{_INDEX}|ndvi_loss_p|aldi")
_RADAR = re.compile(r"d?(vv|vh|vhvv)(_pre|_post)?")
_ASPECT = re.compile(r"(.*_)?aspect_deg")
_EAST_NORTH = (("aspect_sin", "aspect_cos"), ("sin_aspect", "cos_aspect"), ("eastness", "northness"))
"""Names of the east and the north part of the direction that a slope faces."""
_EASTS = {east for east, _ in _EAST_NORTH}
_SLOPES = ("slope_deg", "l4s_slope")
_SIMILAR = 0.35
"""A scar is implanted where the slope is like its own: mean difference below this share of its own mean slope."""
_TRIES = 16
_FREE = (STABLE, UNLABELLED)
"""Labels of ground that a scar may be implanted into."""


def is_optical(name: str) -> bool:
    """Tell whether a feature is seen by an optical sensor: a reflectance, an index, a component of either."""
    return _OPTICAL.fullmatch(name) is not None


def is_radar(name: str) -> bool:
    """Tell whether a feature is backscatter."""
    return _RADAR.fullmatch(name) is not None


def augmented(
    x_fyx: np.ndarray,
    y_yx: np.ndarray,
    names: Sequence[str],
    rng: np.random.Generator,
    *,
    settings: AugmentSettings,
    donor: Callable[[np.random.Generator], Sample],
) -> Sample:
    """Vary a patch by all that the settings switch on; donor : draws a patch that holds a landslide."""
    sample = (x_fyx, y_yx)
    if settings.scars and rng.random() < settings.scars:
        given = donor(rng)
        sample = with_scar(*sample, names, rng, donor=flipped_turned(*given, names, rng))
    sample = flipped_turned(*sample, names, rng, flips=settings.flips, turns=settings.turns)
    if settings.jitter_gain or settings.jitter_offset:
        sample = jittered(*sample, names, rng, gain=settings.jitter_gain, offset=settings.jitter_offset)
    if settings.clouds and rng.random() < settings.clouds:
        sample = clouded(*sample, names, rng)
    return sample


def flipped_turned(
    x_fyx: np.ndarray,
    y_yx: np.ndarray,
    names: Sequence[str],
    rng: np.random.Generator,
    *,
    flips: bool = True,
    turns: bool = True,
) -> Sample:
    """Mirror and turn by quarters at random, one of the eight ways as likely as another; directions follow."""
    mirror, quarters = bool(rng.integers(2)) and flips, int(rng.integers(4)) if turns else 0
    if quarters % 2 and not can_turn(names):
        quarters -= 1
    if mirror:
        x_fyx, y_yx = mirrored(x_fyx, names), y_yx[:, ::-1]
    return (turned(x_fyx, names, quarters), np.rot90(y_yx, quarters)) if quarters else (x_fyx, y_yx)


def can_turn(names: Sequence[str]) -> bool:
    """Tell whether a quarter turn can be computed: eastness needs northness, and the other way round."""
    parts = [_east_north(names, east, north) for east, north in _EAST_NORTH]
    return all((e is None) == (n is None) for e, n in parts)


def turned(x_fyx: np.ndarray, names: Sequence[str], quarters: int) -> np.ndarray:
    """Turn features by quarters against the clock: a slope that faces east, 90 degrees, then faces north, 0."""
    quarters %= 4
    out = np.rot90(x_fyx, quarters, axes=(1, 2)).copy()
    for i in _aspects(names):
        out[i] = _circle(out[i] - np.float32(90 * quarters))
    for pair in _EAST_NORTH:
        east, north = _east_north(names, *pair)
        e, n = (None if i is None else out[i].copy() for i in (east, north))
        sign = -1 if quarters >= 2 else 1
        for at, own, other in ((east, e, None if n is None else -n), (north, n, e)):
            source = other if quarters % 2 else own
            if at is not None:
                if source is None:
                    raise ValueError(f"{names[at]} cannot be turned by a quarter without its other part")
                out[at] = sign * source
    return out


def mirrored(x_fyx: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Swap east and west: a slope that faces east, 90 degrees, then faces west, 270."""
    out = x_fyx[:, :, ::-1].copy()
    for i in _aspects(names):
        out[i] = _circle(-out[i])
    for i, name in enumerate(names):
        if name in _EASTS:
            out[i] = -out[i]
    return out


def directions(names: Sequence[str]) -> list[int]:
    """Places of the features whose values turn with the image."""
    parts = {part for pair in _EAST_NORTH for part in pair}
    return [i for i, name in enumerate(names) if _ASPECT.fullmatch(name) or name in parts]


def _aspects(names: Sequence[str]) -> list[int]:
    return [i for i, name in enumerate(names) if _ASPECT.fullmatch(name)]


def _east_north(names: Sequence[str], east: str, north: str) -> tuple[int | None, int | None]:
    place = {name: i for i, name in enumerate(names)}
    return place.get(east), place.get(north)


def _circle(degrees: np.ndarray) -> np.ndarray:
    """Degrees in [0, 360)."""
    around = np.mod(degrees, np.float32(360))
    return np.where(around == 360, np.float32(0), around)  # of what is a little below 0


def jittered(
    x_fyx: np.ndarray,
    y_yx: np.ndarray,
    names: Sequence[str],
    rng: np.random.Generator,
    *,
    gain: float,
    offset: float,
) -> Sample:
    """Change brightness and contrast of each optical feature: haze, calibration, the season.

    gain, offset : standard deviations, the offset's in standard deviations of the feature in this patch
    """
    out = x_fyx.copy()
    for i, name in enumerate(names):
        by, more = rng.normal(size=2)
        if is_optical(name):
            known = out[i][np.isfinite(out[i])]
            spread = float(known.std()) if known.size else 0.0
            out[i] = out[i] * np.float32(1 + gain * by) + np.float32(offset * more * spread)
    return out, y_yx


def clouded(x_fyx: np.ndarray, y_yx: np.ndarray, names: Sequence[str], rng: np.random.Generator) -> Sample:
    """Paste a smooth cloud that no later image looked through: its pixels are unknown, and not observable.

    It lies over the images before, after, or both; what compares the two loses either. Radar and terrain stay.
    """
    side = ("pre", "post", "both")[int(rng.integers(3))]
    cover = rng.uniform(0.05, 0.4)
    hidden = [i for i, name in enumerate(names) if is_optical(name) and _is_hidden(name, side)]
    rough = rng.normal(size=y_yx.shape)
    if not hidden:
        return x_fyx, y_yx
    smooth = ndimage.gaussian_filter(rough, max(y_yx.shape) / 10)
    cloud = smooth > np.quantile(smooth, 1 - cover)
    out = x_fyx.copy()
    for i in hidden:
        out[i][cloud] = np.nan
    return out, np.where(cloud, np.uint8(IGNORE), y_yx)


def _is_hidden(name: str, side: str) -> bool:
    of = next((s for s in ("pre", "post") if name.endswith(f"_{s}")), "both")
    of = "post" if name.startswith("l4s_") else of
    return "both" in (side, of) or side == of


def with_scar(
    x_fyx: np.ndarray,
    y_yx: np.ndarray,
    names: Sequence[str],
    rng: np.random.Generator,
    *,
    donor: Sample,
) -> Sample:
    """Implant a landslide of another patch, feathered, onto ground of a similar slope where none is known.

    What sensors see of it is copied; the terrain stays. Where no place is found, nothing changes.
    """
    given_fyx, given_yx = donor
    pieces, count = ndimage.label(given_yx == LANDSLIDE)
    piece = pieces == int(rng.integers(count)) + 1 if count else pieces > 0
    tries = rng.integers(-y_yx.shape[0] // 2, y_yx.shape[0] // 2 + 1, size=(_TRIES, 2)).tolist()
    if not count:
        return x_fyx, y_yx
    for dy, dx in tries:
        if _fits(piece, y_yx, _slope(given_fyx, names), _slope(x_fyx, names), shift=(dy, dx)):
            moved_fyx = np.stack([_moved(plane, (dy, dx), np.nan) for plane in given_fyx])
            return _implanted(x_fyx, y_yx, names, moved_fyx, _moved(piece, (dy, dx), fill=False))
    return x_fyx, y_yx


def _slope(x_fyx: np.ndarray, names: Sequence[str]) -> np.ndarray | None:
    return next((x_fyx[i] for i, name in enumerate(names) if name in _SLOPES), None)


def _moved(plane_yx: np.ndarray, shift: tuple[int, int], fill: float) -> np.ndarray:
    """Move a plane by whole pixels; what comes in from outside is `fill`."""
    (dy, dx), (h, w) = shift, plane_yx.shape
    out = np.full_like(plane_yx, fill)
    out[max(dy, 0) : h + min(dy, 0), max(dx, 0) : w + min(dx, 0)] = plane_yx[
        max(-dy, 0) : h + min(-dy, 0), max(-dx, 0) : w + min(-dx, 0)
    ]
    return out


def _fits(
    piece: np.ndarray,
    y_yx: np.ndarray,
    given_slope: np.ndarray | None,
    slope: np.ndarray | None,
    *,
    shift: tuple[int, int],
) -> bool:
    """Tell whether a moved scar lies whole on ground without a known landslide and of a slope like its own."""
    there = _moved(piece, shift, fill=False)
    if there.sum() < piece.sum() or not np.isin(y_yx[there], _FREE).all():
        return False
    if given_slope is None or slope is None:
        return True
    own = given_slope[piece]
    apart = np.abs(slope[there] - own)
    return bool(np.nanmean(apart) <= _SIMILAR * np.nanmean(own)) if np.isfinite(apart).any() else False


def _implanted(
    x_fyx: np.ndarray, y_yx: np.ndarray, names: Sequence[str], given_fyx: np.ndarray, piece: np.ndarray
) -> Sample:
    """Mix a scar in: its share falls from 1 to 0 over two pixels, half of them inside; half and more is landslide."""
    inside, outside = ndimage.distance_transform_edt(piece), ndimage.distance_transform_edt(~piece)
    share = np.clip(0.5 + (np.where(piece, inside - 0.5, 0.5 - outside)) / 2, 0, 1).astype(np.float32)
    seen = [i for i, name in enumerate(names) if is_optical(name) or is_radar(name)]
    share[~np.isfinite(given_fyx[seen]).all(axis=0)] = 0
    share[~np.isin(y_yx, _FREE)] = 0  # neither another landslide nor what nobody observed is painted over
    out = x_fyx.copy()
    for i in seen:
        mixed = (1 - share) * x_fyx[i] + share * given_fyx[i]
        out[i] = np.where(share > 0, mixed, x_fyx[i])
    return out, np.where(piece & (share >= 0.5), np.uint8(LANDSLIDE), y_yx)
