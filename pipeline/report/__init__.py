"""The report of an inventory: an HTML page that opens offline, and a static picture."""

from __future__ import annotations

from slidecube.pipeline.report.page import write_report
from slidecube.pipeline.report.pictures import EpochView, Picture
from slidecube.pipeline.report.static import render_picture

__all__ = ["EpochView", "Picture", "render_picture", "write_report"]
