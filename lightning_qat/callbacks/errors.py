"""The error for a combination of arguments, model and Trainer that cannot work."""

from lightning.fabric.utilities.exceptions import MisconfigurationException


class QATConfigurationError(MisconfigurationException, ValueError):
    """Raised before the first batch; the message names the remedy."""
