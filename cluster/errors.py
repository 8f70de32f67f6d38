"""Errors of the runners: one line each, saying what was wrong, what was got and what is allowed."""

from __future__ import annotations


class ClusterError(Exception):
    """A runner cannot be started or used as asked; the message is one clear line."""
