"""How many bits a run has at each step. Add one: a file here and a line in ``SCHEDULES``."""

from lightning_qat.core.protocols import Schedule
from lightning_qat.schedules.constant import Constant
from lightning_qat.schedules.cosine import Cosine
from lightning_qat.schedules.linear import Linear
from lightning_qat.schedules.open_loop import OpenLoop
from lightning_qat.schedules.plateau import Plateau
from lightning_qat.schedules.specs import ScheduleLike, read_schedule
from lightning_qat.schedules.staggered import Staggered
from lightning_qat.schedules.staircase import Staircase

SCHEDULES: dict[str, type[Schedule]] = {
    "constant": Constant,
    "cosine": Cosine,
    "linear": Linear,
    "plateau": Plateau,
    "staggered": Staggered,
    "staircase": Staircase,
}

__all__ = [
    "SCHEDULES",
    "Constant",
    "Cosine",
    "Linear",
    "OpenLoop",
    "Plateau",
    "ScheduleLike",
    "Staggered",
    "Staircase",
    "read_schedule",
]
