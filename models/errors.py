"""Errors of the detectors: one line each, saying what was wrong, what was got and what is allowed."""

from __future__ import annotations


class ModelError(Exception):
    """A model, its card, its weights or its inputs are unusable; the message is one clear line."""


class DivergedError(ModelError):
    """The numbers of a network in training are no longer finite: what came of its settings, and no fault."""
