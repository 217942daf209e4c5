"""The state of all quantizers of a model apart from its weights, so that a checkpoint stays portable.

A file that keeps this state under a key of its own loads strictly into the plain float model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lightning_qat.core import ActivationObserver, GradientEstimator, Observer, QuantScheme
from lightning_qat.core.registry import build, describe
from lightning_qat.estimators import ESTIMATORS
from lightning_qat.nn.annealed_grid import AnnealedGrid
from lightning_qat.nn.convert import apply_plan, quantized_layers, static_inputs
from lightning_qat.nn.layers import QATLayer
from lightning_qat.nn.plan import plan_exactly
from lightning_qat.nn.sharded import gathered, is_sharded
from lightning_qat.nn.static_input import StaticInputConfig
from lightning_qat.observers import ACTIVATION_OBSERVERS, OBSERVERS

STATE_KEY = "lightning_qat"
"""Where a checkpoint keeps what :func:`quantizer_state` returns."""

_VERSION = 1
_BEFORE_STATIC_INPUTS = {"activation_observer": {"name": "mse"}, "learn_activations": False}
"""What a checkpoint means that does not say it."""


def quantizer_prefixes(root: nn.Module) -> tuple[str, ...]:
    """Return the state-dict prefixes of all quantizers in ``root``."""
    return tuple(f"{name}." for name in _named_quantizers(root))


def _named_quantizers(root: nn.Module) -> dict[str, AnnealedGrid]:
    named = root.named_modules(remove_duplicate=False)
    return {name: module for name, module in named if isinstance(module, AnnealedGrid)}


def quantizer_state(root: nn.Module, parameters: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return structure and state of all quantizers of ``root`` as primitives and tensors.

    Args:
        root: The prepared model.
        parameters: State dict from which to take learned scales where it has them, such as that of a weight
            average. Default: those of ``root``.
    """
    layers = quantized_layers(root)
    config = next(iter(layers.values())).weight_fake_quant.config
    inputs = next((quantizer.config for quantizer in static_inputs(root).values()), StaticInputConfig())
    own: dict[str, Any] = {}
    for name, quantizer in _named_quantizers(root).items():  # not root.state_dict(), which users override
        quantizer.state_dict(destination=own, prefix=f"{name}.")
    # All of them on every process, whatever part of a state dict it was given.
    own = {key: gathered(value) if isinstance(value, Tensor) else value for key, value in own.items()}
    averaged = {
        key: value
        for key, value in (parameters or {}).items()
        if not key.endswith("_extra_state") and not (isinstance(value, Tensor) and is_sharded(value))
    }
    return {
        "version": _VERSION,
        "layers": {name: layer.weight_fake_quant.scheme.to_dict() for name, layer in layers.items()},
        "activations": {
            name: layer.input_fake_quant.scheme.to_dict()
            for name, layer in layers.items()
            if layer.input_fake_quant is not None
        },
        "observer": describe(config.observer, OBSERVERS),
        "estimator": describe(config.estimator, ESTIMATORS),
        "learn_scales": config.learn_scales,
        "activation_observer": describe(inputs.observer, ACTIVATION_OBSERVERS),
        "learn_activations": inputs.learn,
        "quantizers": {key: averaged.get(key, value) for key, value in own.items()},
    }


def load_quantizer_state(root: nn.Module, state: Mapping[str, Any]) -> None:
    """Restore what :func:`quantizer_state` returned into a ``root`` with the same quantized layers.

    Raises:
        ValueError: If the layers, their schemes or their shapes differ, or a newer version wrote it.
    """
    check_state(state)
    present, state = quantizer_state(root), {**_BEFORE_STATIC_INPUTS, **state}
    for part in ("layers", "activations", "learn_scales", "learn_activations"):
        if present[part] != state[part]:
            difference = _difference(part, present[part], state[part])
            raise ValueError(
                f"The checkpoint was trained with other quantizers: {difference}. Use the "
                "arguments of that run, or load only the weights: model.load_state_dict(checkpoint['state_dict'])."
            )
    quantizers: dict[str, Any] = state["quantizers"]
    if set(quantizers) != set(present["quantizers"]):
        raise ValueError("The checkpoint does not hold the state of all quantizers; it is damaged or incomplete.")
    for name, quantizer in _named_quantizers(root).items():
        prefix = f"{name}."
        own = {k.removeprefix(prefix): v for k, v in quantizers.items() if k.startswith(prefix)}
        # Parameters that are spread over processes come with the model's own state dict, in which they stay.
        own.update({key: each for key, each in quantizer.named_parameters() if is_sharded(each)})
        if bad := [key for key, each in own.items() if isinstance(each, Tensor) and not each.isfinite().all()]:
            raise ValueError(f"The checkpoint is damaged: {prefix}{bad[0]} holds NaN or infinity.")
        with _explaining_damage(f"the quantizer '{name}'"):
            quantizer.load_state_dict(own)


def check_state(state: Any) -> None:
    """Check that ``state`` has the entries that :func:`quantizer_state` returns, and is none of a later version.

    Raises:
        ValueError: If not.
    """
    with _explaining_damage("its structure"):
        if state["version"] > _VERSION:
            raise ValueError("The checkpoint was written by a newer lightning_qat. Upgrade the package to load it.")
        for part in ("layers", "activations", "quantizers"):
            if not all(isinstance(name, str) for name in {**state[part]}):
                raise TypeError(f"{part} has a name that is no text")
        if not {*state["activations"]} <= {*state["layers"]}:
            raise KeyError("activations of a layer that is not among the layers")
        for scheme in (*state["layers"].values(), *state["activations"].values()):
            try:
                QuantScheme.parse(scheme)
            except ValueError as error:
                raise TypeError(f"scheme {scheme!r}: {error}") from error
            _check_plain(scheme.values())
        _check_plain([state["learn_scales"], state.get("learn_activations")])
        for part in ("observer", "estimator"):
            state[part]


def _check_plain(values: Iterable[Any]) -> None:
    if odd := [each for each in values if not isinstance(each, (bool, int, float, str, type(None), Mapping))]:
        raise TypeError(f"{odd[0]!r} is no plain value")


@contextmanager
def _explaining_damage(what: str) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise ValueError(
            f"The checkpoint is damaged or was altered: {what} cannot be read ({type(error).__name__}: {error}). Take "
            "another checkpoint of the run."
        ) from error


def _difference(part: str, present: Any, saved: Any) -> str:
    if not isinstance(present, dict):
        return f"{part} is {present}, and was {saved}"
    for name in sorted({*present, *saved}):
        if present.get(name) != saved.get(name):
            return f"'{name}' is {_brief(present.get(name))}, and was {_brief(saved.get(name))}"
    return "nothing"


def _brief(scheme: Mapping[str, Any] | None) -> str:
    if scheme is None:
        return "not quantized"
    return "{" + ", ".join(f"{key}: {value}" for key, value in scheme.items() if value not in (None, False)) + "}"


def rebuild(
    root: nn.Module,
    state: Mapping[str, Any],
    observer: Observer | None = None,
    estimator: GradientEstimator | None = None,
    mapping: Mapping[type[nn.Module], type[QATLayer]] | None = None,
    activation_observer: ActivationObserver | None = None,
) -> None:
    """Put the quantizers that ``state`` describes into a float ``root``, in place, and restore their state.

    Args:
        root: The float model.
        state: What :func:`quantizer_state` returned.
        observer: The observer, if it is not one of the registry.
        estimator: The estimator, if it is not one of the registry.
        mapping: Further layer classes, as in :func:`lightning_qat.nn.prepare`.
        activation_observer: The observer of static inputs, if it is not one of the registry.

    Raises:
        ValueError: If a layer is missing, or observers or estimator are unknown and not given.
    """
    check_state(state)
    state = {**_BEFORE_STATIC_INPUTS, **state}
    schemes = {name: {**scheme, "activation": None} for name, scheme in state["layers"].items()}
    for name, activation in state["activations"].items():
        schemes[name]["activation"] = activation
    plan = plan_exactly(root, schemes, mapping)
    with _explaining_damage("observers and estimator"):
        observer = observer or build(state["observer"], OBSERVERS, "observer")
        estimator = estimator or build(state["estimator"], ESTIMATORS, "estimator")
        activation_observer = activation_observer or build(
            state["activation_observer"], ACTIVATION_OBSERVERS, "activation observer"
        )
        inputs = StaticInputConfig(activation_observer, state["learn_activations"])
    apply_plan(root, plan, observer, estimator, state["learn_scales"], inputs)
    load_quantizer_state(root, state)
