"""The area of interest: what a user wants mapped."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyproj
import shapely
from shapely.geometry.base import BaseGeometry


@dataclass(frozen=True, slots=True, kw_only=True)
class Aoi:
    """An area of interest.

    name : short name, used in file names
    geometry : valid polygon or multipolygon, x/y (lon/lat) order, in `crs`; areas across the antimeridian are
        split at it as RFC 7946 asks
    crs : any text that pyproj understands
    """

    name: str
    geometry: BaseGeometry
    crs: str = "EPSG:4326"

    def to_crs(self, crs: str) -> BaseGeometry:
        """Return the geometry in another CRS, its long edges densified so that they stay true."""
        if pyproj.CRS.from_user_input(self.crs) == pyproj.CRS.from_user_input(crs):
            return self.geometry
        xmin, ymin, xmax, ymax = self.geometry.bounds
        dense = shapely.segmentize(self.geometry, max(xmax - xmin, ymax - ymin) / 64)
        to = pyproj.Transformer.from_crs(self.crs, crs, always_xy=True)

        def project(xy: np.ndarray) -> np.ndarray:
            return np.column_stack(to.transform(xy[:, 0], xy[:, 1]))

        return shapely.make_valid(shapely.transform(dense, project))
