"""Errors of the pipeline: one line each, saying what was wrong, what was got and what is allowed."""

from __future__ import annotations


class PipelineError(Exception):
    """A configuration, plan, workspace or input is unusable; the message is one clear line."""


class IncompleteError(PipelineError):
    """The work stopped before it was whole and may be resumed by the same command (exit code 2)."""
