"""Height above the nearest drainage, by pyflwdir (D8, depressions filled; Wang & Liu 2006)."""

from __future__ import annotations

import numpy as np
import pyflwdir

from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.landform import CHANNEL_KM2

MOST_CELLS = 4_000_000
"""Of one window: their priority queue takes seconds, and some 100 bytes a cell."""


def height_above_drainage(z: np.ndarray, dx_m: np.ndarray | float, dy_m: float) -> np.ndarray:
    """Height of each cell above the drainage cell that its water reaches first.

    z : (y, x), metres, NaN = nodata, where water may leave, as it may at the edge; dx_m : width of the cells, one
        number or one a row; dy_m : their height
    Returns (y, x) float32 metres, 0 or more; NaN where z is.
    Raises PipelineError for a DEM so fine that a window has more than MOST_CELLS.
    Source: Nobre et al. 2011, doi:10.1016/j.jhydrol.2011.03.051, on the filled DEM.
    """
    if z.size > MOST_CELLS:
        raise PipelineError(
            f"hand_m looks at {z.size / 1e6:.0f} million cells of {dy_m:.1f} m, more than {MOST_CELLS / 1e6:.0f} "
            "million; name a coarser DEM in [sources], 5 m or more"
        )
    known = np.isfinite(z)
    if not known.any():
        return np.full(z.shape, np.nan, np.float32)
    filled, d8 = pyflwdir.dem.fill_depressions(z.astype(np.float32), nodata=np.nan)
    flow = pyflwdir.from_array(d8, ftype="d8", check_ftype=False)
    width = np.broadcast_to(np.asarray(dx_m, np.float64).reshape(-1, 1), (z.shape[0], 1))
    cells_km2 = np.broadcast_to(width * dy_m / 1e6, z.shape)
    upstream_km2 = flow.accuflux(np.where(known, cells_km2, 0.0), nodata=-1.0)
    height = flow.hand(drain=upstream_km2 >= CHANNEL_KM2, elevtn=filled.astype(np.float64))
    return np.where(known, height, np.nan).astype(np.float32)
