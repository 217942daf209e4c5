"""The plugin without a Trainer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from rich.console import Console
from torch import nn

from lightning_qat.core import ActivationObserver, GradientEstimator, Observer, PTQMethod
from lightning_qat.core.checks import check_choice, check_positive
from lightning_qat.core.registry import build
from lightning_qat.files import read_checkpoint
from lightning_qat.nn import (
    PatternsLike,
    QATLayer,
    Rule,
    RulesLike,
    check_finite,
    check_mapping,
    find_final_bits,
    parse_patterns,
    parse_rules,
    quantized_layers,
)
from lightning_qat.nn.calibrate import GIB
from lightning_qat.nn.forward import evaluation_mode
from lightning_qat.nn.meta_copy import meta_copy
from lightning_qat.nn.state import STATE_KEY, check_state, rebuild
from lightning_qat.nn.sweep import PTQResults, sweep
from lightning_qat.nn.sweep_plan import plan_sweep, progress_bar, read_bits
from lightning_qat.observers import ACTIVATION_OBSERVERS, OBSERVERS
from lightning_qat.ptq import build_methods

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def load_qat(
    module: ModuleT,
    checkpoint: str | Path | Mapping[str, Any],
    *,
    observer: Observer | None = None,
    estimator: GradientEstimator | None = None,
    mapping: Mapping[type[nn.Module], type[QATLayer]] | None = None,
    activation_observer: ActivationObserver | None = None,
    weights_only: bool = True,
) -> ModuleT:
    """Load a checkpoint of a run with ``QATCallback`` into a plain ``module``, quantizers included.

    A plain ``load_state_dict`` would give the float weights that the run kept underneath, which score better
    or worse than the quantized model that was trained.

    Args:
        module: The LightningModule (or whatever was the root of the run), in float; it is changed in place. If it
            has a ``configure_model``, that is called, and its ``strict_loading`` is respected.
        checkpoint: Path of the checkpoint, or its content.
        observer: The observer of the run, if it is not one of the registry.
        estimator: The estimator of the run, likewise.
        mapping: The ``mapping`` of the run, if it had one.
        activation_observer: The observer of static inputs of the run, if it is not one of the registry.
        weights_only: Passed to :func:`torch.load`; False for a trusted file that holds other objects, such as
            hyper-parameters of custom classes.

    Returns:
        ``module``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the checkpoint is damaged, is not of such a run, does not fit the module, or holds objects other
            than plain data. The module is as it was then, unless it cannot be copied.
    """
    content = checkpoint if isinstance(checkpoint, Mapping) else read_checkpoint(checkpoint, weights_only)
    if STATE_KEY not in content:
        raise ValueError(_explain_missing_state(content.get("state_dict", content)))
    if callable(configure_model := getattr(module, "configure_model", None)):
        configure_model()
    check_state(content[STATE_KEY])
    floats = _without_quantizers(content)
    if broken := [name for name, tensor in floats.items() if _has_nan(tensor)]:
        more = ", ..." if len(broken) > 3 else ""
        raise ValueError(f"The checkpoint holds NaN in {', '.join(broken[:3])}{more}: its run diverged. Take another.")

    def load(target: nn.Module) -> None:
        _load_floats(target, floats)
        rebuild(target, content[STATE_KEY], observer, estimator, mapping, activation_observer)

    if (trial := meta_copy(module)) is not None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*copying from a non-meta parameter")
            load(trial)
    load(module)
    return module


def _has_nan(tensor: Any) -> bool:
    return isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and bool(tensor.isnan().any())


def _without_quantizers(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state dict of a checkpoint but for the quantizers, which sharded strategies keep in there, too."""
    floats = content.get("state_dict")
    if not isinstance(floats, Mapping):
        raise ValueError("The checkpoint has no 'state_dict'; it is damaged or incomplete.")
    return {key: value for key, value in floats.items() if key not in content[STATE_KEY]["quantizers"]}


def _explain_missing_state(state_dict: Mapping[str, Any]) -> str:
    if any(".weight_fake_quant." in key for key in state_dict):
        return (
            "The checkpoint was saved with save_weights_only=True: it holds weights and grids, but not which layers "
            "were quantized how. Prepare the module as the callback did, then load: QATCallback(...).prepare(module); "
            "module.load_state_dict(checkpoint['state_dict'])."
        )
    return (
        f"The checkpoint has no {STATE_KEY!r} entry: it was not saved with QATCallback. Load it with "
        "module.load_state_dict(checkpoint['state_dict'])."
    )


def _load_floats(module: nn.Module, state_dict: Mapping[str, Any]) -> None:
    try:
        module.load_state_dict(state_dict, strict=getattr(module, "strict_loading", True))
    except RuntimeError as error:
        raise ValueError(
            f"The checkpoint does not fit the module. Build it as in that run; layers made in setup() must be there "
            f"before load_qat. {error}"
        ) from error


def quantize_model(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    methods: Sequence[str | Mapping[str, Any]] | Mapping[str, PTQMethod] = ("rtn", "awq", "gptq"),
    bits: float | Sequence[float] | None = None,
    scheme: RulesLike | None = None,
    ignore: PatternsLike = (),
    observer: str | Mapping[str, Any] | Observer = "minmax",
    activation_observer: str | Mapping[str, Any] | ActivationObserver = "mse",
    target_module: str | None = None,
    mapping: Mapping[type[nn.Module], type[QATLayer]] | None = None,
    step: Callable[[Any], Any] | None = None,
    memory_budget_gib: float = 4.0,
    unseen: Literal["error", "rtn"] = "error",
    sequential: bool = False,
    progress: bool = True,
) -> PTQResults:
    """Quantize a float model after training, by every method at every width, from one calibration.

    The model is not changed; ``results.apply(copy.deepcopy(model), "gptq", 4)`` gives a quantized one.

    Args:
        model: The float model, on the device that calibration shall use; it is calibrated in evaluation mode.
        batches: Calibration batches, from training data, on the same device.
        methods: Names (``rtn``, ``imatrix``, ``awq``, ``gptq``), mappings with ``name`` and arguments, or methods
            by the names they shall have in the results.
        bits: Width or widths. Default: that of the scheme.
        scheme: Scheme or rules at the smallest of ``bits`` (``"w2g32"`` for ``bits=(4, 2)``), as in ``QATCallback``.
            Default: symmetric per channel.
        ignore: Modules that stay in float.
        observer: Where ranges come from for methods that do not search for them.
        activation_observer: Where the ranges of static inputs come from, which are calibrated on ``batches``, in float.
        target_module: Name of the submodule outside which nothing is quantized.
        mapping: Further layer classes.
        step: Called with each batch; runs the model. Default: ``model`` on the batch, by keywords if it is a
            mapping, of which ``attention_mask`` also tells padding from tokens.
        memory_budget_gib: GiB for Hessians; if they need more, the batches are read several times.
        unseen: What to do with layers that no token reached: ``"error"``, or ``"rtn"``.
        sequential: Calibrate later parts of the model on what the quantized earlier ones give, once for every method
            and width, instead of all on the float model's inputs. It takes longer, and gains at few bits.
        progress: Show the plan and bars.

    Returns:
        A :class:`~lightning_qat.nn.sweep.PTQResults`: quantized weights by (method, width), how each layer fared, and
        ``apply``.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If an argument is not valid or does not fit the model, which must be in float; if a layer saw no
            token, or inputs were NaN or infinite; layers are named.
    """
    if isinstance(batches, (Mapping, torch.Tensor, str)) or not isinstance(batches, Iterable):
        raise TypeError(
            f"batches must be several batches, such as [batch] or a loader, got a {type(batches).__name__}."
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a Module, got {model if isinstance(model, type) else type(model).__name__}.")
    if quantized_layers(model):
        raise ValueError(
            "The model has fake quantization in it, from QATCallback, prepare or results.apply. If the weights "
            "underneath are what is to be quantized, call restore_float(model) first."
        )
    if step is not None and not callable(step):
        raise TypeError(f"step={step!r} must be a function that runs the model on a batch.")
    check_positive(memory_budget_gib, "memory_budget_gib")
    check_choice(unseen, "unseen", ("error", "rtn"))
    rules = None if scheme is None else parse_rules(scheme)
    widths = read_bits(bits, "bits") or _widths_of(rules)
    plan = plan_sweep(model, widths, rules, parse_patterns(ignore), target_module, check_mapping(mapping))
    check_finite(plan.layers)
    with evaluation_mode(model):
        return sweep(
            model,
            plan,
            list(batches),
            build_methods(methods),
            widths,
            build(observer, OBSERVERS, "observer"),
            activation_observer=build(activation_observer, ACTIVATION_OBSERVERS, "activation observer"),
            step=step,
            memory_budget=int(memory_budget_gib * GIB),
            unseen=unseen,
            sequential=sequential,
            progress=progress_bar if progress else None,
            tell=Console(stderr=True).print if progress else None,
        )


def _widths_of(rules: Sequence[Rule] | None) -> tuple[float, ...]:
    if rules is None:
        raise ValueError("Give bits, such as bits=(8, 4, 3), or a scheme, such as scheme='w4g128'.")
    return (find_final_bits(rules),)
