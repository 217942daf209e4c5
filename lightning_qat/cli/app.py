"""Runs a Hydra app, after a look at its configuration that takes no time and trusts nothing."""

from __future__ import annotations

import itertools
import logging
import math
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_module
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import DictConfig

from lightning_qat.cli.explain import FAILED, UsageError, exit_code, explain
from lightning_qat.cli.trust import check_config, packages_of, trust

CONFIG_MODULE = "lightning_qat.conf"
_MAX_COMBINATIONS = 1000


def run_app(task: Callable[[DictConfig], Any], name: str, arguments: Sequence[str], command: str | None = None) -> int:
    """Run ``task`` with the configuration ``name``, and return the exit code.

    Args:
        task: Called with the composed configuration.
        name: Name of the configuration.
        arguments: What follows the command: Hydra's options and overrides, and ``--trust PACKAGE``.
        command: Name of the command. Default: that of the configuration.
    """
    program = f"lightning-qat {command or name}"
    had_full_errors = os.environ.get("HYDRA_FULL_ERROR")
    try:
        arguments = _take_trusted(arguments)
        _look_at(name, arguments)
        # Hydra raises what a run raised, and we tell.
        os.environ["HYDRA_FULL_ERROR"] = "1"
        _quieten()
        sys.argv = [program, *arguments]
        hydra.main(version_base="1.3", config_path=f"pkg://{CONFIG_MODULE}", config_name=name)(task)()
    except (Exception, KeyboardInterrupt) as error:
        if had_full_errors:
            traceback.print_exc()
        print(f"\n{program}: {explain(error)}", file=sys.stderr)
        if not had_full_errors and exit_code(error) == FAILED:
            print("HYDRA_FULL_ERROR=1 shows where that was.", file=sys.stderr)
        return exit_code(error)
    return 0


def quote(value: object) -> str:
    """Return a text as an override takes it."""
    return QuotedString(str(value), Quote.single).with_quotes()


def _quieten() -> None:
    """Leave out what others say of themselves in every arm."""
    os.environ.setdefault("WANDB_SILENT", "true")
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")  # Lightning on current torch
    logging.getLogger("hydra._internal.core_plugins.basic_launcher").setLevel(logging.WARNING)


def _take_trusted(arguments: Sequence[str]) -> list[str]:
    """Return the arguments without ``--trust``, whose packages are trusted from now on."""
    rest, given = [], iter(arguments)
    for argument in given:
        if argument == "--trust":
            trust([next(given, "")])
        else:
            rest.append(argument)
    trust(packages_of(rest))
    return rest


def _look_at(name: str, arguments: Sequence[str]) -> None:
    """Compose the configuration, once for each combination of swept groups, and check what it names.

    Hydra itself calls parts of it before any task begins.
    """
    parsed = get_args_parser().parse_args([*arguments])
    if parsed.help or parsed.hydra_help or parsed.shell_completion or parsed.info:
        return
    for overrides in _combinations(parsed.overrides, parsed.config_dir):
        with initialize_config_module(version_base="1.3", config_module=CONFIG_MODULE):
            composed = compose(parsed.config_name or name, overrides, return_hydra_config=True)
        check_config(composed)


def _combinations(overrides: Sequence[str], config_dir: str | None) -> Iterator[list[str]]:
    """Yield the overrides without sweeps: each combination of groups, and of values the first."""
    extra = [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"] if config_dir else []
    choices: list[list[str]] = []
    with initialize_config_module(version_base="1.3", config_module=CONFIG_MODULE):
        loader = GlobalHydra.instance().config_loader()
        for override in OverridesParser.create(loader).parse_overrides([*overrides]):
            line = str(override.input_line)
            if not override.is_sweep_override():
                choices.append([line])
                continue
            key = f"{line.partition('=')[0]}="
            values = [f"{key}{value}" for value in override.sweep_string_iterator()]
            is_group = "/" in override.key_or_group or override.key_or_group in loader.list_groups("")
            choices.append(values if is_group else values[:1])
    if math.prod(map(len, choices)) > _MAX_COMBINATIONS:
        raise UsageError(f"This sweeps over more than {_MAX_COMBINATIONS} combinations of groups. Split it up.")
    for combination in itertools.product(*choices):
        yield [*extra, *combination]
