"""A look at what a configuration calls. It catches mistakes, and is no protection against a recipe made for harm.

Interpolations that are resolved later, and settings of Hydra itself, get around it.

Hydra calls whatever ``_target_`` names. Here it may be a module, callback, logger, ... of the packages below, or
anything of a package that the user names on the command line (``--trust``, or in ``_target_`` itself), or in the
environment variable ``LIGHTNING_QAT_TRUST``, from which jobs on other machines know it, too.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

PACKAGES = ("lightning_qat", "lightning", "pytorch_lightning", "torch", "torchmetrics")
VARIABLE = "LIGHTNING_QAT_TRUST"
_HYDRA_PLUGINS = ("hydra._internal.core_plugins.", "hydra_plugins.")
_HYDRA_CALLBACKS = ("lightning_qat.cli.sweep.SweepTable",)
_LOGGING_CLASSES = ("logging.StreamHandler", "logging.FileHandler", "logging.NullHandler", "colorlog.ColoredFormatter")


class UntrustedError(ValueError):
    """A configuration names something that it may not call."""


def trust(packages: Iterable[str]) -> None:
    """Let configurations call what is in ``packages``, in this process and those that it starts."""
    os.environ[VARIABLE] = ",".join(dict.fromkeys([*trusted_packages(), *filter(None, packages)]))


def trusted_packages() -> list[str]:
    """Return the packages that the user trusts besides :data:`PACKAGES`."""
    return [each for each in os.environ.get(VARIABLE, "").split(",") if each]


def build(node: Any, **arguments: Any) -> Any:
    """Return what a node of the configuration stands for; a module may be in the current folder.

    Raises:
        UntrustedError: If it names something that a configuration may not call.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    check_targets(node)
    return instantiate(node, **arguments)


def check_config(cfg: DictConfig) -> None:
    """Check the names in a composed configuration, Hydra's own part included; nothing is imported.

    Raises:
        UntrustedError: If it names something that is neither in :data:`PACKAGES` nor trusted by the user.
    """
    trusted = trusted_packages()
    container = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(container, dict)
    hydra = container.pop("hydra", {})
    packages = (*PACKAGES, *trusted)
    for where, target in _targets(container):
        _check_package(where, target, packages)
    for name in ("launcher", "sweeper"):
        for where, target in _targets(hydra.get(name)):
            if not str(target).startswith(_HYDRA_PLUGINS):
                _check_package(f"hydra.{name}.{where}", target, trusted)
    for where, target in _targets(hydra.get("callbacks")):
        if target not in _HYDRA_CALLBACKS:
            _check_package(f"hydra.callbacks.{where}", target, trusted)
    for name in ("hydra_logging", "job_logging"):
        for where, target in _targets(hydra.get(name), keys=("()", "class")):
            if target not in _LOGGING_CLASSES:
                _check_package(f"hydra.{name}.{where}", target, trusted)


def check_targets(cfg: Any) -> None:
    """Import what a configuration is about to call, and check that it is what the name says.

    Raises:
        UntrustedError: If a name leads out of its package (``lightning_qat.api.os.system``), or to a function of
            torch or Lightning, where only classes such as modules and callbacks are called.
    """
    trusted = trusted_packages()
    for where, target in _targets(cfg):
        _check_package(where, target, (*PACKAGES, *trusted))
        found = _locate(target)
        package = str(getattr(found, "__module__", "")).split(".")[0]
        if package not in (*PACKAGES, *trusted):
            raise UntrustedError(f"{where}={target} is not part of {target.split('.')[0]}. {_remedy(target)}")
        if package not in trusted and not _is_harmless(found):
            raise UntrustedError(
                f"{where}={target} is neither a module, task, data module, callback, logger nor another part of a "
                f"Trainer. {_remedy(target)}"
            )


def packages_of(overrides: Sequence[str]) -> list[str]:
    """Return the packages that the user has named in ``_target_`` overrides on the command line."""
    pairs = (override.partition("=") for override in overrides)
    return [value.strip("'\"").split(".")[0] for key, _, value in pairs if key.rstrip("+").endswith("_target_")]


def _targets(node: Any, path: str = "", keys: Sequence[str] = ("_target_",)) -> Iterator[tuple[str, str]]:
    if OmegaConf.is_config(node):
        node = OmegaConf.to_container(node, resolve=False)
    if isinstance(node, Mapping):
        for key, value in node.items():
            where = f"{path}.{key}".lstrip(".")
            if key in keys:
                yield where, str(value)
            yield from _targets(value, where, keys)
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield from _targets(value, f"{path}[{index}]", keys)


def _check_package(where: str, target: str, packages: Iterable[str]) -> None:
    if target.split(".")[0] not in packages:
        raise UntrustedError(
            f"{where}={target} is not among the packages that a configuration may call. {_remedy(target)}"
        )


def _remedy(target: str) -> str:
    return f"If you trust this configuration, add --trust {target.split('.')[0]}."


def _locate(target: str) -> Any:
    """Return the object with a dotted path.

    Raises:
        UntrustedError: If there is none.
    """
    parts = target.split(".")
    for length in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError as error:
            if error.name is None or not target.startswith(error.name):
                raise
            continue
        for part in parts[length:]:
            if not hasattr(found, part):
                raise UntrustedError(f"There is no {target!r}: {'.'.join(parts[:length])} has no {part!r}.")
            found = getattr(found, part)
        return found
    raise UntrustedError(f"There is no {target!r}: is {parts[0]!r} installed, or in the current folder?")


def _is_harmless(found: Any) -> bool:
    import lightning.pytorch as pl
    import torch
    from lightning.pytorch.loggers import Logger
    from lightning.pytorch.profilers import Profiler
    from lightning.pytorch.strategies import Strategy

    from lightning_qat.tasks import MODELS

    parts = (torch.nn.Module, pl.LightningDataModule, pl.Callback, pl.Trainer, Logger, Profiler, Strategy)
    return found in MODELS.values() or (isinstance(found, type) and issubclass(found, parts))
