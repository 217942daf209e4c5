"""The shorthand of a scheme, such as ``w4g128``.

It is ``w<bits>``, then ``g<group_size>``, then ``a<bits>`` for a dynamic, asymmetric activation per token
(``a16`` for none), then flags after hyphens: ``tensor``, ``asym``, ``nozero``, ``pad``, ``bf16`` or ``fp16``
(scales), a scale rule, ``static`` for an activation with one grid per tensor that calibration finds, or ``actsym``
for a symmetric activation.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from lightning_qat.core.scheme import QuantScheme

ScaleRule = Literal["half_range", "cell_range", "qmax", "signed_max"]

EXAMPLES = "for example 'w8', 'w4g128', 'w4a8', 'w8a8-static', 'w3g64-asym', 'w2g32-nozero' or 'w4g32-bf16'"

_SHORTHAND = re.compile(r"w(?P<bits>\d+(\.\d+)?)(g(?P<group>\d+))?(a(?P<act>\d+))?(?P<flags>(-[a-z0-9_]+)*)")
_FLAGS: dict[str, dict[str, Any]] = {
    "tensor": {"granularity": "tensor"},
    "asym": {"symmetric": False},
    "nozero": {"zero_offset": 0.5},
    "pad": {"pad_last_group": True},
    "bf16": {"scale_dtype": "bfloat16"},
    "fp16": {"scale_dtype": "float16"},
    **{rule: {"scale_rule": rule} for rule in get_args(ScaleRule)},
    "static": {},
    "actsym": {},
}
_OF_ACTIVATIONS = ("static", "actsym")
_EXCLUSIVE = ({"bf16", "fp16"}, set(get_args(ScaleRule)))
_NO_ACTIVATION = 16
_FEWEST_OF_ACTIVATIONS = 2


def default_scale_rule(num_bits: float, zero_offset: float | None) -> ScaleRule:
    """Return the scale rule of a scheme that does not name one."""
    return "cell_range" if zero_offset or num_bits < 2 else "half_range"


def parse_shorthand(text: str) -> dict[str, Any]:
    """Return the fields that ``text`` stands for.

    Raises:
        ValueError: If it is not a shorthand.
    """
    match = _SHORTHAND.fullmatch(text.strip().lower())
    flags = match["flags"].split("-")[1:] if match else []
    if match is None or not set(flags) <= set(_FLAGS):
        raise ValueError(f"Cannot read the scheme {text!r}. Write {EXAMPLES}; flags: {', '.join(_FLAGS)}.")
    if clash := [names for names in _EXCLUSIVE if len(names & set(flags)) > 1]:
        raise ValueError(f"The flags {' and '.join(sorted(clash[0] & set(flags)))} of {text!r} contradict each other.")
    has_activation = bool(match["act"]) and int(match["act"]) != _NO_ACTIVATION
    for flag in _OF_ACTIVATIONS:
        if flag in flags and not has_activation:
            raise ValueError(f"The flag {flag} of {text!r} is for activations: write their bits, as in 'w4a8-{flag}'.")
    if has_activation and int(match["act"]) < _FEWEST_OF_ACTIVATIONS:
        raise ValueError(f"{text!r}: activations have 2 bits or more.")
    fields: dict[str, Any] = {"num_bits": float(match["bits"])}
    if match["group"]:
        fields["group_size"] = int(match["group"])
    if has_activation:
        granularity = "tensor" if "static" in flags else "token"
        symmetric = "actsym" in flags
        fields["activation"] = {"num_bits": int(match["act"]), "symmetric": symmetric, "granularity": granularity}
    for flag in flags:
        fields.update(_FLAGS[flag])
    return fields


def format_shorthand(scheme: QuantScheme) -> str:
    """Return the shorthand of the scheme of a weight."""
    flags = {
        "tensor": scheme.granularity == "tensor",
        "asym": not scheme.symmetric,
        "nozero": scheme.num_bits == 2 and scheme.zero_offset != 0,
        "pad": scheme.pad_last_group,
        "bf16": scheme.scale_dtype == "bfloat16",
        "fp16": scheme.scale_dtype == "float16",
        str(scheme.scale_rule): scheme.scale_rule != default_scale_rule(scheme.num_bits, scheme.zero_offset),
        "static": scheme.has_static_activation,
        "actsym": scheme.activation is not None and scheme.activation.symmetric,
    }
    text = f"w{scheme.num_bits:g}" + (f"g{scheme.group_size}" if scheme.group_size else "")
    text += f"a{scheme.activation.num_bits:g}" if scheme.activation else ""
    return text + "".join(f"-{flag}" for flag, is_set in flags.items() if is_set)
