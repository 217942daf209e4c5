"""Quantization after training. Add a method: a file here and a line in ``PTQ_METHODS``."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_qat.core.protocols import PTQMethod
from lightning_qat.core.registry import build
from lightning_qat.ptq.awq import AWQ
from lightning_qat.ptq.gptq import GPTQ
from lightning_qat.ptq.imatrix import IMatrix
from lightning_qat.ptq.rtn import RTN

PTQ_METHODS: dict[str, type[PTQMethod]] = {"rtn": RTN, "imatrix": IMatrix, "gptq": GPTQ, "awq": AWQ}


def build_methods(spec: Sequence[str | Mapping[str, Any]] | Mapping[str, PTQMethod]) -> dict[str, PTQMethod]:
    """Return methods by name from names, mappings with ``name`` and arguments, or methods by name.

    Raises:
        ValueError: If there are none, one is not known, or a name occurs twice.
    """
    if not isinstance(spec, (str, Mapping, Sequence)):
        raise TypeError(f"methods={spec!r} must be names such as ('rtn', 'gptq'). Known: {', '.join(PTQ_METHODS)}.")
    if isinstance(spec, str) and "," in spec:
        raise ValueError(f"methods={spec!r} is one string. Give a tuple: {tuple(spec.replace(' ', '').split(','))!r}.")
    if isinstance(spec, Mapping) and "name" not in spec:
        methods = {name: build(method, PTQ_METHODS, "method") for name, method in spec.items()}
    else:
        entries = [spec] if isinstance(spec, (str, Mapping)) else list(spec)
        methods = {_name(entry): build(entry, PTQ_METHODS, "method") for entry in entries}
        if len(methods) < len(entries):
            raise ValueError("A method is listed twice. Give a mapping from names of your own to methods.")
    if not methods:
        raise ValueError(f"There are no methods. Known: {', '.join(sorted(PTQ_METHODS))}.")
    return methods


def _name(entry: str | Mapping[str, Any]) -> str:
    if isinstance(entry, str) or (isinstance(entry, Mapping) and "name" in entry):
        return entry if isinstance(entry, str) else str(entry["name"])
    raise TypeError(f"A method is a name or a mapping with a 'name', got {entry!r}. Known: {', '.join(PTQ_METHODS)}.")


__all__ = ["AWQ", "GPTQ", "PTQ_METHODS", "RTN", "IMatrix", "build_methods"]
