"""Arms of the benchmark of quantization-aware training on stories260k: techniques, alone and together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# One technique each: arguments of QATCallback by width and learning rate.
TECHNIQUES: dict[str, Callable[[int, float], dict[str, Any]]] = {
    "range by MSE": lambda bits, lr: {"observer": "mse"},
    "learned scales": lambda bits, lr: {"scale_lr": lr},
    "distillation": lambda bits, lr: {"distillation": True},
    "grid without zero": lambda bits, lr: {"scheme": "w2-nozero"},
    "oscillation freezing": lambda bits, lr: {"oscillation": {"freeze_threshold": (0.04, 0.011), "momentum": 0.02}},
    "dampening": lambda bits, lr: {"oscillation": {"dampening": 0.1}},
    "grids by imatrix": lambda bits, lr: {"init": "imatrix"},
    "weights by GPTQ": lambda bits, lr: {"init": {"method": "gptq", "weights": True}},
    "annealing": lambda bits, lr: {"schedule": ANNEALED[bits]},
    "blend": lambda bits, lr: {"blend_until": 0.4},
    "layer outputs": lambda bits, lr: {"distillation": {"hidden": "LlamaDecoderLayer"}},
}
ANNEALED = {4: {0.0: 8, 0.35: 4}, 3: {0.0: 8, 0.175: 4, 0.35: 3}, 2: {0.0: 8, 0.12: 4, 0.24: 3, 0.35: 2}}
_COMMON = ("range by MSE", "learned scales", "distillation")
BEST = {
    4: (*_COMMON, "weights by GPTQ", "oscillation freezing"),
    3: (*_COMMON, "oscillation freezing"),
    2: (*_COMMON, "grid without zero"),
}
MAIN = {"STE": (), "LSQ": ("range by MSE", "learned scales"), "everything": BEST}
ALONE, WITH, WITHOUT = "STE + ", "everything + ", "everything - "


def names_of(arm: str, bits: int) -> list[str]:
    """Return the techniques of an arm at a width."""
    if arm in MAIN:
        found = MAIN[arm]
        return list(found[bits] if isinstance(found, dict) else found)
    if arm.startswith(WITH):
        return [*BEST[bits], arm.removeprefix(WITH)]
    if arm.startswith(WITHOUT):
        return [name for name in BEST[bits] if name != arm.removeprefix(WITHOUT)]
    return [arm.removeprefix(ALONE)] if arm.startswith(ALONE) else []


def arguments_of(arm: str, bits: int, lr: float) -> dict[str, Any]:
    """Return the arguments of QATCallback of an arm; where scales are not learned, those of ``init`` are kept."""
    arguments: dict[str, Any] = {"scheme": f"w{bits}"}
    for name in names_of(arm, bits):
        for key, value in TECHNIQUES[name](bits, lr).items():
            both = isinstance(value, dict) and isinstance(arguments.get(key), dict)
            arguments[key] = {**arguments[key], **value} if both else value
    return arguments | ({"freeze_at": 0} if "init" in arguments and "scale_lr" not in arguments else {})


def ablation(bits: int) -> list[tuple[str, str]]:
    """Return pairs of an arm of the ablation at a width and the arm that it differs from by one technique."""
    pairs = []
    for name in TECHNIQUES:
        if name == "grid without zero" and bits != 2:
            continue
        pairs.append((f"{ALONE}{name}", "STE"))
        pairs.append((f"{WITHOUT if name in BEST[bits] else WITH}{name}", "everything"))
    return pairs
