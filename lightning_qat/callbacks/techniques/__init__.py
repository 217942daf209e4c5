"""Techniques of training, each switched on by an argument of QATCallback. Add one: a file here and a line below."""

from lightning_qat.callbacks.techniques.batch_norm import BatchNorm
from lightning_qat.callbacks.techniques.distillation import Distillation
from lightning_qat.callbacks.techniques.initialization import Initialization
from lightning_qat.callbacks.techniques.inputs import Inputs, make_inputs
from lightning_qat.callbacks.techniques.oscillation import Oscillation
from lightning_qat.callbacks.techniques.technique import Technique, read_technique

TECHNIQUES: dict[str, type[Technique]] = {
    "init": Initialization,
    "inputs": Inputs,
    "oscillation": Oscillation,
    "batch_norm": BatchNorm,
    "distillation": Distillation,
}

__all__ = [
    "TECHNIQUES",
    "BatchNorm",
    "Distillation",
    "Initialization",
    "Inputs",
    "Oscillation",
    "Technique",
    "make_inputs",
    "read_technique",
]
