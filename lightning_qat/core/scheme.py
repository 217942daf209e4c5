"""What a quantized tensor looks like: :class:`QuantScheme`, and its ``w4g128`` shorthand."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch

from lightning_qat.core.shorthand import EXAMPLES, ScaleRule, default_scale_rule, format_shorthand, parse_shorthand

Granularity = Literal["tensor", "channel", "group", "token"]
ScaleDtype = Literal["float32", "bfloat16", "float16"]

PASS_THROUGH_BITS = 16
"""The width that means "not quantized yet": the rung on which an annealed run may start."""

_CODE_RANGE: dict[float, tuple[int, int]] = {
    1: (-1, 0),
    1.58: (-1, 1),
    **{bits: (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) for bits in range(2, 9)},
}
WIDTHS = (*_CODE_RANGE, PASS_THROUGH_BITS)
"""All widths in bits; 1.58 is ternary."""


class Levels(NamedTuple):
    """The integers of a grid and how far apart they lie, as numbers or as 0-d float32 tensors.

    A level is ``(code - zero_point + zero_offset) * scale`` for an integer code in ``[qmin, qmax]``.
    As tensors they can change during training without a recompilation.
    """

    qmin: float | torch.Tensor
    qmax: float | torch.Tensor
    zero_offset: float | torch.Tensor
    scale_divisor: float | torch.Tensor


@dataclass(frozen=True)
class QuantScheme:
    """How one weight is quantized and, in ``activation``, how the input of its layer is.

    Args:
        num_bits: Width in bits: 1, 1.58 (ternary), 2 to 8, or 16 for a pass-through.
        symmetric: Symmetric around zero (zero-point 0), or asymmetric with an integer zero-point.
        granularity: What shares one scale: the ``"tensor"``, an output ``"channel"``, a ``"group"`` of
            ``group_size`` neighbours along the input, or, for activations, a ``"token"``. Default:
            ``"group"`` if a ``group_size`` is given, else ``"channel"``.
        group_size: Number of input features that share one scale.
        zero_offset: Shift of all levels in units of the scale. 0.5 is the grid without a zero, whose 2-bit
            levels are ``±1/4, ±3/4`` of the largest weight (SEQ in ParetoQ, arXiv:2502.02631).
        scale_rule: What a symmetric range is divided by to give the scale. ``"half_range"``, the default
            (at 4 bits: absmax / 7.5), is that of compressed-tensors and of torchao's ``SYMMETRIC``;
            ``"cell_range"`` (absmax / 8) is the default of the grids without a zero and of ternary;
            ``"qmax"`` is absmax / 7; ``"signed_max"`` gives the extreme weight the code ``qmin``, and a
            negative scale if it is positive (GGUF).
        scale_dtype: Type that the scale is rounded to *before* it is used, so that a file which stores it
            in that type holds exactly what was trained.
        pad_last_group: Allow a last group that is shorter than ``group_size``.
        activation: Scheme of the layer's input, or its fields: with granularity ``"token"``, the default, dynamic,
            its range taken from the input at hand; with ``"tensor"`` static, one grid for all inputs, found by
            calibration. Asymmetric unless it says otherwise.

    Raises:
        ValueError: If a field is out of range, or two fields contradict each other.

    Example::

        >>> QuantScheme.parse("w4g128") == QuantScheme(num_bits=4, group_size=128)
        True
        >>> QuantScheme(num_bits=4).levels()
        Levels(qmin=-8, qmax=7, zero_offset=0.0, scale_divisor=7.5)
        >>> str(QuantScheme.parse("w4a8").activation)
        '8 bits per token, asymmetric'
    """

    num_bits: float
    symmetric: bool = True
    granularity: Granularity | None = None
    group_size: int | None = None
    zero_offset: float | None = None
    scale_rule: ScaleRule | None = None
    scale_dtype: ScaleDtype = "float32"
    pad_last_group: bool = False
    activation: QuantScheme | None = None

    def __post_init__(self) -> None:
        """Fill in the defaults that depend on other fields, then validate."""
        fill = object.__setattr__
        if isinstance(self.num_bits, float) and self.num_bits.is_integer():
            fill(self, "num_bits", int(self.num_bits))
        if self.num_bits not in WIDTHS or isinstance(self.num_bits, bool):
            raise ValueError(f"Invalid quantization scheme: num_bits={self.num_bits!r} is not one of {WIDTHS[:-1]}.")
        if self.granularity is None:
            fill(self, "granularity", "channel" if self.group_size is None else "group")
        if self.zero_offset is None:
            fill(self, "zero_offset", 0.5 if self.num_bits == 1 else 0.0)
        if self.scale_rule is None:
            fill(self, "scale_rule", default_scale_rule(self.num_bits, self.zero_offset))
        activation: Any = self.activation
        if isinstance(activation, Mapping):
            fill(self, "activation", QuantScheme(**{"granularity": "token", "symmetric": False, **activation}))
        if problems := self._problems():
            raise ValueError("Invalid quantization scheme: " + " ".join(problems))

    def _problems(self) -> list[str]:
        problems = [
            f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}."
            for name, value, allowed in (
                ("granularity", self.granularity, get_args(Granularity)),
                ("zero_offset", self.zero_offset, (0.0, 0.5)),
                ("scale_rule", self.scale_rule, get_args(ScaleRule)),
                ("scale_dtype", self.scale_dtype, get_args(ScaleDtype)),
            )
            if value not in allowed
        ]
        if (self.granularity == "group") != (self.group_size is not None):
            problems.append(
                f"granularity={self.granularity!r} and group_size={self.group_size} contradict each other; "
                "give group_size alone for groups, and leave it out otherwise."
            )
        if self.group_size is not None and (not isinstance(self.group_size, int) or self.group_size < 1):
            problems.append(f"group_size={self.group_size!r} must be a positive whole number of input features.")
        if self.pad_last_group and self.group_size is None:
            problems.append("pad_last_group needs a group_size.")
        if self.zero_offset and self.scale_rule in ("qmax", "signed_max"):
            problems.append("a grid without a zero has the scale_rule 'cell_range' or 'half_range'.")
        if not self.symmetric and self.num_bits < 2:
            problems.append("1 and 1.58 bits have no asymmetric grid.")
        elif not self.symmetric and (self.zero_offset, self.scale_rule) != (0.0, "half_range"):
            problems.append("an asymmetric grid has its own zero-point: leave zero_offset and scale_rule out.")
        if self.zero_offset and self.num_bits not in (1, 2):
            problems.append("the grid without a zero is for 1 and 2 bits; above, it is worse than the one with.")
        if self.num_bits == 1 and not self.zero_offset:
            problems.append("1 bit has the levels ±scale/2, so its zero_offset is 0.5.")
        if self.granularity == "token" and self.num_bits < 2:
            problems.append("activations have 2 bits or more.")
        return problems + self._problems_of_activation()

    def _problems_of_activation(self) -> list[str]:
        problems = []
        if self.activation is not None:
            if self.granularity == "token" or self.activation.activation is not None:
                problems.append("the scheme of an activation cannot have an activation itself.")
            if self.activation.granularity not in ("token", "tensor"):
                problems.append("activations are quantized with granularity='token' (dynamic) or 'tensor' (static).")
            if self.activation.num_bits < 2:
                problems.append("activations have 2 bits or more.")
            if self.activation.num_bits == PASS_THROUGH_BITS > self.num_bits:
                problems.append("activations of 16 bits are not quantized: leave activation out.")
        return problems

    @classmethod
    def parse(cls, spec: str | Mapping[str, Any] | QuantScheme) -> QuantScheme:
        """Read a scheme from its shorthand, from a mapping of fields, or return it as it is.

        See :mod:`lightning_qat.core.shorthand`.

        Args:
            spec: Shorthand, mapping of field names to values, or scheme.

        Returns:
            The scheme.

        Raises:
            ValueError: If the text is not such a shorthand, or the scheme is not valid.
            TypeError: If ``spec`` is of another type, or names a field that does not exist.
        """
        if isinstance(spec, QuantScheme):
            return spec
        if isinstance(spec, Mapping):
            unknown = sorted(set(spec) - {field.name for field in dataclasses.fields(cls)})
            if unknown or "num_bits" not in spec:
                known = ", ".join(field.name for field in dataclasses.fields(cls))
                raise TypeError(f"A scheme needs num_bits and takes the fields {known}; got {sorted(spec)}.")
            return cls(**spec)
        if not isinstance(spec, str):
            raise TypeError(f"Expected a QuantScheme or its shorthand ({EXAMPLES}), got {spec!r}.")
        return cls(**parse_shorthand(spec))

    @property
    def final_bits(self) -> float:
        """The smaller of the widths of weight and activation, which the last rung of a schedule must reach."""
        return self.num_bits if self.activation is None else min(self.num_bits, self.activation.num_bits)

    @property
    def has_static_activation(self) -> bool:
        """Whether inputs have one grid per tensor, which calibration finds."""
        return self.activation is not None and self.activation.granularity == "tensor"

    def levels(self) -> Levels:
        """Return code range, zero offset and scale divisor of the grid; pass-through has those of 8 bits."""
        qmin, qmax = _CODE_RANGE[min(self.num_bits, 8)]
        zero_offset = self.zero_offset or 0.0
        if not self.symmetric:
            return Levels(qmin, qmax, zero_offset, float(qmax - qmin))
        divisors = {
            "half_range": (qmax - qmin) / 2,
            "cell_range": (qmax - qmin + 1) / 2,
            "qmax": float(qmax),
            "signed_max": float(-qmin),
        }
        return Levels(qmin, qmax, zero_offset, divisors[self.scale_rule or "half_range"])

    def at(self, num_bits: float) -> QuantScheme:
        """Return the scheme as it is on a rung of an annealing schedule.

        The width is ``max(num_bits, own width)``. The grid without a zero applies at the final width only.
        """
        activation = self.activation.at(num_bits) if self.activation else None
        scheme = self if num_bits <= self.num_bits else self.with_bits(num_bits)
        return dataclasses.replace(scheme, activation=activation)

    def with_bits(self, num_bits: float) -> QuantScheme:
        """Return the scheme with another width of the weight, on the plain grid of that width."""
        own_rule = self.scale_rule != default_scale_rule(self.num_bits, self.zero_offset)
        rule = self.scale_rule if own_rule else None
        return dataclasses.replace(self, num_bits=num_bits, zero_offset=None, scale_rule=rule)

    def describe_as_input(self) -> str:
        """Return the scheme of an activation in words."""
        granularity = "per token" if self.granularity == "token" else "per tensor (static)"
        return f"{self.num_bits:g} bits {granularity}, {'symmetric' if self.symmetric else 'asymmetric'}"

    @property
    def torch_scale_dtype(self) -> torch.dtype:
        """``scale_dtype`` as a :class:`torch.dtype`."""
        dtype: torch.dtype = getattr(torch, self.scale_dtype)
        return dtype

    def num_groups(self, in_features: int) -> int:
        """Return how many scales one output channel of ``in_features`` inputs has.

        Raises:
            ValueError: If ``group_size`` does not divide ``in_features`` and ``pad_last_group`` is off.
        """
        if self.group_size is None:
            return 1
        if in_features % self.group_size and not self.pad_last_group:
            raise ValueError(
                f"group_size={self.group_size} does not divide in_features={in_features}; sizes that do: "
                f"{fitting_group_sizes(in_features)}. Choose one of them or set pad_last_group=True ('-pad')."
            )
        return -(-in_features // self.group_size)

    def effective_bits(self, out_features: int, in_features: int) -> float:
        """Return bits per weight including scales and zero-points, for a weight ``[out_features, in_features]``."""
        if self.num_bits == PASS_THROUGH_BITS:
            return float(PASS_THROUGH_BITS)
        num_scales = 1 if self.granularity == "tensor" else out_features * self.num_groups(in_features)
        bits_per_scale = 8 * self.torch_scale_dtype.itemsize + (0 if self.symmetric else self.num_bits)
        return self.num_bits + num_scales * bits_per_scale / (out_features * in_features)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as primitives, from which :meth:`parse` makes an equal scheme."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        """Return the shorthand of a weight scheme, or a phrase for one of an activation."""
        if self.granularity == "token":
            return self.describe_as_input()
        return format_shorthand(self)


def fitting_group_sizes(in_features: int, smallest: int = 8) -> list[int]:
    """Return the group sizes from ``smallest`` up that divide ``in_features``, largest first."""
    return [size for size in range(in_features, smallest - 1, -1) if in_features % size == 0]
