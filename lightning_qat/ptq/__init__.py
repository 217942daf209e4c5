"""Quantization after training. Add a method: a file here and a line in ``PTQ_METHODS``."""

from lightning_qat.core.protocols import PTQMethod
from lightning_qat.ptq.rtn import RTN

PTQ_METHODS: dict[str, type[PTQMethod]] = {"rtn": RTN}

__all__ = ["PTQ_METHODS", "RTN"]
