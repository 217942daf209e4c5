"""The error for a combination of arguments, model and Trainer that cannot work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.fabric.utilities.exceptions import MisconfigurationException


class QATConfigurationError(MisconfigurationException, ValueError):
    """Raised before the first batch; the message names the remedy."""


@contextmanager
def as_configuration_error() -> Iterator[None]:
    """Turn a ValueError from the layers below, which know no Lightning, into a :class:`QATConfigurationError`."""
    try:
        yield
    except QATConfigurationError:
        raise
    except ValueError as error:
        raise QATConfigurationError(str(error)) from error
