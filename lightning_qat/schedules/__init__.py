"""How many bits a run has at each step. Add one: a file here and a line in ``SCHEDULES``."""

from lightning_qat.core.protocols import Schedule
from lightning_qat.schedules.constant import Constant
from lightning_qat.schedules.staircase import Staircase

SCHEDULES: dict[str, type[Schedule]] = {"constant": Constant, "staircase": Staircase}

__all__ = ["SCHEDULES", "Constant", "Staircase"]
