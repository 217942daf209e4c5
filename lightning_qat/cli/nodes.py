"""Config nodes made from Python signatures, so that a default is written once and a misspelled argument is noticed.

``lightning_qat.conf`` stores them when Hydra first looks into it; nothing here imports torch.
"""

from __future__ import annotations

from typing import Any, Union

from hydra.core.config_store import ConfigStore
from omegaconf import AnyNode, BooleanNode, DictConfig, IntegerNode, ListConfig, StringNode, UnionNode

from lightning_qat.cli.signatures import NO_DEFAULT, Argument, read_arguments, read_registry

TASK_GROUPS = {"data": ("DATA", "data"), "task": ("TASKS", "task"), "model": ("MODELS", "task.model")}
"""Group of options: the registry in ``lightning_qat.tasks``, and where an option goes in a configuration."""

PART_GROUPS = {
    "observer": ("lightning_qat.observers", "OBSERVERS"),
    "activation_observer": ("lightning_qat.observers", "ACTIVATION_OBSERVERS"),
    "estimator": ("lightning_qat.estimators", "ESTIMATORS"),
    "schedule": ("lightning_qat.schedules", "SCHEDULES"),
}
"""Argument of ``QATCallback`` that names an entry of a registry: where that is."""

CALLBACKS = {
    "qat": "lightning_qat.QATCallback",
    "ptq": "lightning_qat.PTQCallback",
    "early_stopping": "lightning.pytorch.callbacks.EarlyStopping",
    "learning_rate": "lightning.pytorch.callbacks.LearningRateMonitor",
    "ema": "lightning.pytorch.callbacks.EMAWeightAveraging",
    "rich_progress_bar": "lightning.pytorch.callbacks.RichProgressBar",
}
LOGGERS = {
    "csv": "lightning.pytorch.loggers.CSVLogger",
    "tensorboard": "lightning.pytorch.loggers.TensorBoardLogger",
    "wandb": "lightning.pytorch.loggers.WandbLogger",
}


def store_all() -> None:
    """Store a node for the Trainer, every callback, logger, task, data set, model and entry of a registry."""
    store = ConfigStore.instance().store
    store("default", make_node("lightning.pytorch.Trainer"), group="trainer", package="trainer")
    for name, target in CALLBACKS.items():
        store(name, make_node(target), group="callbacks", package=f"callbacks.{name}")
    for name, target in LOGGERS.items():
        store(name, make_node(target), group="logger/node", package="logger")
    for group, (registry, package) in TASK_GROUPS.items():
        for name, target in read_registry("lightning_qat.tasks", registry).items():
            store(name, make_node(target), group=group, package=package)
    for group, where in PART_GROUPS.items():
        for name, target in read_registry(*where).items():
            node = {"name": name, **_make_arguments(target)}
            store(name, DictConfig(node), group=f"callbacks/qat/{group}", package=f"callbacks.qat.{group}")
    for name, target in read_registry("lightning_qat.ptq", "PTQ_METHODS").items():
        store(name, DictConfig(_make_arguments(target)), group="ptq", package=f"ptq.{name}")


def make_node(target: str) -> DictConfig:
    """Return a node that Hydra instantiates: all arguments of ``target`` with their types and defaults."""
    content: dict[str, Any] = {"_target_": target, "_convert_": "all", **_make_arguments(target)}
    return DictConfig(content)


def _make_arguments(target: str) -> dict[str, Any]:
    return {argument.name: _make_value(argument) for argument in read_arguments(target)}


def _make_value(argument: Argument) -> Any:
    default = "???" if argument.default is NO_DEFAULT else argument.default
    if isinstance(default, list | tuple):
        return ListConfig(list(default))
    if isinstance(default, dict):
        return DictConfig(default)
    match sorted(argument.types):
        case ["bool"]:
            return BooleanNode(default, is_optional=argument.is_optional)
        case ["int"]:
            return IntegerNode(default, is_optional=argument.is_optional)
        case ["str"]:
            return StringNode(default, is_optional=argument.is_optional)
    if not argument.types or "str" in argument.types:
        return AnyNode(default)
    types = {"bool": bool, "int": int, "float": float}
    # An int stays one where a float is asked for: 200 are steps, 0.5 is half of the run.
    members = {*(types[name] for name in argument.types), int}
    return UnionNode(default, Union[tuple(members)], is_optional=argument.is_optional)  # noqa: UP007
