"""Which scheme a layer gets: ordered rules, of which the last match wins."""

from __future__ import annotations

import difflib
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from lightning_qat.core import QuantScheme


@dataclass(frozen=True)
class Rule:
    """Quantize what ``target`` matches, with all that it contains, by ``scheme``.

    Args:
        target: A module type (``"Linear"``), or a pattern for module names in which ``*`` stands for anything.
            A pattern matches from any dot on: ``lm_head`` matches ``model.lm_head``.
        scheme: The scheme, or None to leave the layers in float.
    """

    target: str
    scheme: QuantScheme | None

    def matches(self, parts: Iterable[tuple[str, type]], names: Container[str] = ()) -> bool:
        """Return whether the rule applies to one of ``parts``: (name, type) of a module and what contains it.

        Args:
            parts: Names and types.
            names: The names of all modules; see :func:`matches`.
        """
        return any(matches(self.target, name, module_type, names) for name, module_type in parts)

    def asks_for(self, labels: Iterable[str]) -> bool:
        """Return whether one part of the target is one of ``labels``, and not a wildcard that covers it."""
        return not set(self.target.split(".")).isdisjoint(labels)


RulesLike = str | QuantScheme | Mapping[str, Any] | Sequence[Mapping[str, Any] | Rule]
"""A scheme for everything, or ordered rules."""

PatternsLike = str | type | Sequence[str | type] | None
"""Patterns of modules."""


def matches(pattern: str, name: str, layer_type: type, names: Container[str] = ()) -> bool:
    """Return whether ``pattern`` is the type, or matches the name or its end from a dot on.

    A pattern that is the whole name of one of ``names`` means that module alone: ``conv1`` of a ResNet is its first
    convolution, and not also the first one of every block, which ``*.conv1`` is.
    """
    if pattern in names:
        return name == pattern
    return pattern == layer_type.__name__ or fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def parse_rules(spec: RulesLike) -> tuple[Rule, ...]:
    """Read one scheme for everything, or a list of rules ``{"target": ..., "scheme": ...}``.

    A type may be given as the class or by its name.

    Raises:
        ValueError: If the list is empty or a scheme is not valid.
        TypeError: If an entry is not such a mapping.
    """
    if isinstance(spec, Mapping) and "target" in spec:
        spec = [spec]
    if isinstance(spec, Sequence) and not isinstance(spec, str):
        if not spec:
            raise ValueError("The list of rules is empty. Give a scheme such as 'w4g128', or at least one rule.")
        return tuple(_parse_rule(entry) for entry in spec)
    return (Rule("*", _parse_scheme(spec)),)


def _parse_rule(entry: Any) -> Rule:
    if isinstance(entry, Rule):
        return entry
    if not isinstance(entry, Mapping) or set(entry) != {"target", "scheme"}:
        raise TypeError(f"A rule is a mapping with the keys 'target' and 'scheme', got {entry!r}.")
    scheme = entry["scheme"]
    return Rule(_parse_pattern(entry["target"]), None if scheme is None else _parse_scheme(scheme))


def find_final_bits(rules: Iterable[Rule]) -> float:
    """Return the smallest width of all schemes, at which a schedule must end.

    Raises:
        ValueError: If no rule has a scheme.
    """
    widths = [rule.scheme.final_bits for rule in rules if rule.scheme is not None]
    if not widths:
        raise ValueError("No rule has a scheme, so nothing would be quantized. Remove the callback or give one.")
    return min(widths)


def parse_patterns(spec: PatternsLike) -> list[str]:
    """Read patterns of modules: one or several, each a pattern for names, the name of a type, or a class."""
    if spec is None:
        return []
    if not isinstance(spec, (str, type, Iterable)):
        raise TypeError(f"Expected patterns for module names, such as ['*.mlp'], or module classes, got {spec!r}.")
    patterns = [spec] if isinstance(spec, (str, type)) else list(spec)
    return [_parse_pattern(pattern) for pattern in patterns]


def _parse_pattern(pattern: Any) -> str:
    if isinstance(pattern, type):
        return pattern.__name__
    if not isinstance(pattern, str):
        raise TypeError(f"Expected a pattern for module names, such as '*.mlp', or a module class, got {pattern!r}.")
    if not pattern:
        raise ValueError("A pattern for module names is empty. Leave it out, or use '*' for all modules.")
    return pattern


def _parse_scheme(spec: Any) -> QuantScheme:
    scheme = QuantScheme.parse(spec)
    if scheme.num_bits > 8 or scheme.granularity == "token":
        raise ValueError(
            f"A weight cannot have the scheme '{scheme}': its width must be 8 bits or less and its granularity "
            "tensor, channel or group. To leave layers in float use ignore=[...] or a rule with scheme=None."
        )
    return scheme


def check_patterns(patterns: Iterable[str], modules: Mapping[str, type], what: str) -> None:
    """Check that each pattern matches a module.

    Args:
        patterns: Patterns or type names.
        modules: Type of every module by name.
        what: What the patterns are, for the message.

    Raises:
        ValueError: If one matches none; the message offers names that look like it.
    """
    for pattern in patterns:
        if not any(matches(pattern, name, layer_type) for name, layer_type in modules.items()):
            names = {*modules, *(name.rpartition(".")[2] for name in modules), *(t.__name__ for t in modules.values())}
            close = difflib.get_close_matches(pattern, sorted(names - {""}), n=3) or sorted(set(modules) - {""})[:5]
            raise ValueError(f"{what} {pattern!r} matches no module. Did you mean one of {close}?")
