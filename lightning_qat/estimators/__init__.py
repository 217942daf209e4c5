"""How a gradient passes the rounding. Add one: a file here and a line in ``ESTIMATORS``."""

from lightning_qat.core.protocols import GradientEstimator
from lightning_qat.estimators.ste import ClippedSTE

ESTIMATORS: dict[str, type[GradientEstimator]] = {"ste": ClippedSTE}

__all__ = ["ESTIMATORS", "ClippedSTE"]
