"""The errors a user of the library can cause: one line that says what was expected, what came, and the remedy."""

from __future__ import annotations


class FastSAEError(ValueError):
    """A user error. The command line prints its message on one line of stderr and exits with status 2."""


class ConfigError(FastSAEError):
    """A configuration field, or a combination of fields, that cannot be meant."""


class DataError(FastSAEError):
    """Input of the wrong shape or width, or with values that are not finite."""


class TooDenseError(FastSAEError):
    """A ReLU code with a row of more than `max_l0` active latents, where a sparse one was asked for."""


class CheckpointError(FastSAEError):
    """A saved dictionary that is missing, incomplete, or of another format."""


class MissingDependencyError(FastSAEError, ImportError):
    """An optional package is needed here and is not installed; the message names it and how to get it."""
