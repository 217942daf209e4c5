"""Techniques of training, each switched on by an argument of QATCallback. Add one: a file here and a line below."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_qat.callbacks.techniques.batch_norm import BatchNorm
from lightning_qat.callbacks.techniques.distillation import Distillation
from lightning_qat.callbacks.techniques.host import TechniqueHost
from lightning_qat.callbacks.techniques.initialization import Initialization
from lightning_qat.callbacks.techniques.inputs import Inputs, check_static_inputs, make_inputs
from lightning_qat.callbacks.techniques.oscillation import Oscillation
from lightning_qat.callbacks.techniques.technique import Technique, read_technique

TECHNIQUES: dict[str, type[Technique]] = {
    "init": Initialization,
    "inputs": Inputs,
    "oscillation": Oscillation,
    "batch_norm": BatchNorm,
    "distillation": Distillation,
}


def read_techniques(named: Mapping[str, Any], further: Sequence[Technique]) -> list[Technique]:
    """Return the techniques that arguments stand for, and further ones.

    Args:
        named: Values of arguments by the name of their technique; see :func:`read_technique`.
        further: Techniques of the user's own.

    Raises:
        TypeError: If one is no technique.
        ValueError: If two have the same name.
    """
    read = [read_technique(spec, TECHNIQUES[name]) for name, spec in named.items()]
    found = [technique for technique in (*read, *further) if technique is not None]
    if not all(isinstance(technique, Technique) for technique in found):
        raise TypeError(f"techniques={further!r} must be instances of subclasses of Technique.")
    names = [technique.name for technique in found]
    if len(set(names)) < len(names):
        raise ValueError(f"The techniques {names} do not all have different names.")
    return found


__all__ = [
    "TECHNIQUES",
    "BatchNorm",
    "Distillation",
    "Initialization",
    "Inputs",
    "Oscillation",
    "Technique",
    "TechniqueHost",
    "check_static_inputs",
    "make_inputs",
    "read_technique",
    "read_techniques",
]
