"""Errors of the pipeline: one line each, saying what was wrong, what was got and what is allowed."""

from __future__ import annotations


class PipelineError(Exception):
    """A configuration, plan, workspace or input is unusable; the message is one clear line.

    fault : class of it, for what is tried again
    """

    fault = "data"


class IncompleteError(PipelineError):
    """The work stopped before it was whole and may be resumed by the same command (exit code 2)."""


class DrainedError(IncompleteError):
    """The work was asked to end early, and the same command goes on (exit code 75)."""


class InUseError(PipelineError):
    """Somebody else holds what was asked for."""


class FencedError(PipelineError):
    """Another driver holds the workspace now: nothing may be written any more."""

    fault = "fenced"


class PassingError(PipelineError):
    """A tile could not be read for a reason that passes; it is worth another attempt.

    fault : "transient", "throttled" or "expired"
    """

    def __init__(self, message: str, fault: str) -> None:
        super().__init__(message)
        self.fault = fault
