"""Which layers of a model are quantized, and why the others are not."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_qat.core import fitting_group_sizes
from lightning_qat.nn.adapters import explain_adapter, is_adapter_layer, parts_of_adapters, replaced_modules
from lightning_qat.nn.layers import QATLayer, float_type
from lightning_qat.nn.plan import QAT_CLASSES, Plan, PlannedLayer, find_qat_class
from lightning_qat.nn.reserved import frozen_parts, output_heads
from lightning_qat.nn.rules import Rule, check_patterns, matches


def make_plan(
    root: nn.Module,
    rules: Sequence[Rule],
    ignore: Sequence[str] = (),
    target_module: str | None = None,
    mapping: Mapping[type[nn.Module], type[QATLayer]] | None = None,
    include_frozen: bool = False,
) -> Plan:
    """Decide for every module of ``root``; nothing is changed.

    Quantized by default: Linear, Conv1d/2d/3d and Hugging Face's Conv1D, by exact type. Embeddings, the
    output head and children of ``root`` that do not train at all only if a rule names them.

    Args:
        root: The model, in float or already prepared.
        rules: Ordered rules; the last that matches a layer wins.
        ignore: Patterns of modules that stay in float with all that they contain.
        target_module: Name of the submodule outside which nothing is quantized.
        mapping: Further layer classes, each with the class that it turns into.
        include_frozen: Quantize children that do not train, too.

    Raises:
        ValueError: If a pattern or the whole plan matches nothing, tied layers would get different schemes,
            a group size does not divide, or ``target_module`` does not exist.
    """
    return _Selection(root, rules, ignore, target_module, mapping, include_frozen).plan()


class _Selection:
    """One run of :func:`make_plan`."""

    def __init__(
        self,
        root: nn.Module,
        rules: Sequence[Rule],
        ignore: Sequence[str],
        target_module: str | None,
        mapping: Mapping[type[nn.Module], type[QATLayer]] | None,
        include_frozen: bool,
    ) -> None:
        self.root, self.rules, self.ignore, self.mapping = root, rules, ignore, mapping
        self.reached: set[Rule] = set()
        self.decisive: set[Rule] = set()
        self.optional: set[nn.Module] = set()  # in float only because no rule asks for them
        self.names: dict[nn.Module, list[str]] = defaultdict(list)
        for name, module in root.named_modules(remove_duplicate=False):
            self.names[module].append(name)
        self.all_names = {name for names in self.names.values() for name in names}
        self.adapter_layers, self.replaced = parts_of_adapters(self.names), replaced_modules(self.names)
        self.owners: dict[nn.Parameter, list[nn.Module]] = defaultdict(list)
        for module in self.names:
            for parameter in module._parameters.values():
                if parameter is not None:
                    self.owners[parameter].append(self.adapter_layers.get(module, module))
        self.frozen_parts = set() if include_frozen else frozen_parts(root)
        self.heads = output_heads(self.names)
        self.scope = target_module
        if target_module is not None and target_module not in dict(root.named_modules()):
            close = sorted(name for name, _ in root.named_children())
            raise ValueError(f"target_module={target_module!r} does not exist; the children are {close}.")

    def plan(self) -> Plan:
        modules = {name: float_type(module) for module, names in self.names.items() for name in names}
        check_patterns((rule.target for rule in self.rules), modules, "The rule target")
        check_patterns(self.ignore, modules, "The ignore pattern")
        layers: dict[nn.Module, PlannedLayer] = {}
        skipped: dict[str, str] = {}
        for module, names in self.names.items():
            chosen = self._choose(module, names)
            if isinstance(chosen, PlannedLayer):
                layers[module] = chosen
            elif chosen:
                skipped[names[0]] = chosen
        self._add_ties(layers, skipped)
        if not layers:
            raise ValueError(f"There is no layer to quantize. {_list_reasons(skipped)}. Change scheme or ignore.")
        self._check_rules_reach_something(skipped)
        _check_group_sizes(layers.values())
        ordered = [layers[module] for module in self.names if module in layers]
        return Plan(tuple(ordered), skipped, tuple(rule.target for rule in self.rules if rule not in self.decisive))

    def _check_rules_reach_something(self, skipped: Mapping[str, str]) -> None:
        for rule in self.rules:
            if rule not in self.reached:
                matched = [
                    (name, reason)
                    for name, reason in skipped.items()
                    if rule.matches(self._parts(name), self.all_names)
                ]
                reasons = "; ".join(f"{name}: {reason}" for name, reason in matched[:3]) or "it holds no matrix"
                raise ValueError(
                    f"The rule target {rule.target!r} matches no layer that can be quantized ({reasons}). "
                    "Remove the rule, or let its target match such a layer."
                )

    def _parts(self, name: str) -> list[tuple[str, type[nn.Module]]]:
        """Return name and float type of a module and of all that contain it, except the root."""
        return [(prefix, float_type(self.root.get_submodule(prefix))) for prefix in _prefixes(name)]

    def _choose(self, module: nn.Module, names: list[str]) -> PlannedLayer | str | None:
        """Return the layer as planned, the reason to leave it in float, or None if it holds no matrix."""
        layer_type, parameters = float_type(module), [each for each in module._parameters.values() if each is not None]
        if self.adapter_layers.get(module, module) is not module:
            return None
        holds_matrix = any(is_lazy(parameter) or parameter.dim() > 1 for parameter in parameters)
        if not (holds_matrix or is_adapter_layer(module)):
            return None
        qat_class = find_qat_class(module, self.mapping)
        if any(is_lazy(parameter) for parameter in parameters):
            return "its shape is not known yet (run a batch through the model first)"
        reason = self._reason_outside(module, names) or self._reason_by_type(module, layer_type, qat_class)
        if reason or qat_class is None:
            return reason
        parts = [part for name in names for part in self._parts(name)] or [("", layer_type)]
        candidates = [rule for rule in self.rules if rule.matches(parts, self.all_names)]
        for target, labels, text in self._reservations(module, names):
            candidates = [rule for rule in candidates if rule.asks_for(labels)]
            if not candidates:
                self.optional.add(module)
                return f"{text} (a rule with target '{target}' quantizes it)"
        if not candidates:
            self.optional.add(module)
            return "no rule matches"
        self.reached.update(candidates)
        self.decisive.add(candidates[-1])
        scheme = candidates[-1].scheme
        return "float by rule" if scheme is None else PlannedLayer(names[0], module, qat_class, scheme)

    def _reason_outside(self, module: nn.Module, names: list[str]) -> str | None:
        if module in self.replaced:
            return "PEFT has replaced it by a copy that trains"
        parts = [_prefixes(name) for name in names]
        if self.scope is not None and not any(self.scope in prefixes for prefixes in parts):
            return "outside target_module"
        for prefix in {prefix for prefixes in parts for prefix in prefixes}:
            ancestor = self.root.get_submodule(prefix)
            if any(matches(pattern, prefix, float_type(ancestor), self.all_names) for pattern in self.ignore):
                return "ignored"
            if ("torchmetrics.metric", "Metric") in {(cls.__module__, cls.__name__) for cls in type(ancestor).__mro__}:
                return "part of a torchmetrics Metric"
            if isinstance(ancestor, nn.MultiheadAttention) and ancestor is not module:
                return "nn.MultiheadAttention uses its weight without calling it"
        return None

    def _reason_by_type(
        self, module: nn.Module, layer_type: type[nn.Module], qat_class: type[QATLayer] | None
    ) -> str | None:
        if qat_class is None and is_adapter_layer(module):
            return explain_adapter(module)
        if qat_class is None:
            bases = [base.__name__ for base in QAT_CLASSES if issubclass(layer_type, base)]
            hint = f", a subclass of {bases[0]} (support it with mapping=)" if bases else ""
            of_its_own = "the parameters outside layers of " if any(True for _ in module.children()) else ""
            return f"no quantized form of {of_its_own}{layer_type.__name__}{hint}"
        if not qat_class.parameters_of(module):
            return "its weight is computed, not a parameter"
        if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.sparse):
            return "an embedding with max_norm or sparse gradients has no quantized form"
        return None

    def _reservations(self, module: nn.Module, names: list[str]) -> Iterable[tuple[str, list[str], str]]:
        """Yield what a rule must name for the module to be quantized, which words do, and why."""
        for name in names:
            # What was quantized while it trained stays so when it is frozen afterwards.
            for part in self.frozen_parts.intersection(_prefixes(name)):
                if not isinstance(module, QATLayer):
                    yield part, [part.rpartition(".")[2]], "its part of the model does not train"
        if issubclass(float_type(module), nn.Embedding):
            yield names[0], [names[0].rpartition(".")[2], "Embedding"], "embeddings stay in float"
        elif heads := [prefix for prefix in _prefixes(names[0]) if self.root.get_submodule(prefix) in self.heads]:
            yield heads[0], [head.rpartition(".")[2] for head in heads], "the output head stays in float"

    def _add_ties(self, layers: dict[nn.Module, PlannedLayer], skipped: dict[str, str]) -> None:
        for planned in list(layers.values()):
            for owner in self.owners[planned.weight]:
                name, qat_class = self.names[owner][0], find_qat_class(owner, self.mapping)
                if owner is not planned.module and self.adapter_layers.keys() & {owner, planned.module}:
                    raise ValueError(
                        f"'{planned.name}' and '{name}' share one weight, but adapters would make two of it. Take "
                        "adapters and sharing apart (tie_word_embeddings=False), or add one of the layers to ignore."
                    )
                same_layout = qat_class is not None and qat_class.to_matrix is planned.qat_class.to_matrix
                if not (owner in layers or owner in self.optional) or not same_layout or qat_class is None:
                    raise ValueError(
                        f"'{planned.name}' shares its weight with '{name}' ({float_type(owner).__name__}), which "
                        f"stays in float ({skipped.get(name)}). Let both be quantized, or add both to ignore."
                    )
                partner = layers.setdefault(owner, replace(planned, name=name, module=owner, qat_class=qat_class))
                skipped.pop(name, None)
                if replace(partner.scheme, activation=None) != replace(planned.scheme, activation=None):
                    raise ValueError(
                        f"'{planned.name}' ({planned.scheme}) and '{name}' ({partner.scheme}) share one weight; "
                        "give them one scheme."
                    )


def _prefixes(name: str) -> list[str]:
    """Return the names of a module and of all that contain it, except the root."""
    parts = name.split(".") if name else []
    return [".".join(parts[: index + 1]) for index in range(len(parts))]


def _check_group_sizes(layers: Iterable[PlannedLayer]) -> None:
    shapes = [(layer, layer.matrix_shape[1]) for layer in layers]
    misfits = []
    for layer, in_features in shapes:
        try:
            layer.scheme.num_groups(in_features)
        except ValueError:
            misfits.append(f"{layer.name} (in_features={in_features}, {layer.scheme})")
    if misfits:
        grouped = [in_features for layer, in_features in shapes if layer.scheme.group_size]
        common = [size for size in fitting_group_sizes(min(grouped)) if not any(n % size for n in grouped)]
        remedy = f"Group sizes that divide them all: {common}." if common else "No group size of 8 or more divides all."
        raise ValueError(
            f"The group size does not divide in_features of {len(misfits)} layers: {', '.join(misfits)}. {remedy} "
            "Choose another, allow a shorter last group ('-pad', pad_last_group=True), or ignore these layers."
        )


def _list_reasons(skipped: Mapping[str, str]) -> str:
    if not skipped:
        return "The model has no Linear or convolution layer"
    counts = Counter(skipped.values())
    return "Left in float: " + "; ".join(f"{count} x {reason}" for reason, count in counts.items())
