"""Errors as a user reads them: what is wrong, and the nearest thing that would be right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from hydra.core.config_store import ConfigStore
from hydra.errors import ConfigCompositionException, HydraException, InstantiationException, MissingConfigException
from omegaconf import DictConfig
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)

from lightning_qat.cli.trust import UntrustedError

FAILED, MISUSED, INTERRUPTED = 1, 2, 130
"""Exit codes: a run failed; the command or its configuration is wrong, and nothing was run; Ctrl-C."""


class UsageError(ValueError):
    """The configuration is well formed, and cannot work."""


def exit_code(error: BaseException) -> int:
    """Return the exit code for an error."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    kinds = (HydraException, OmegaConfBaseException, UntrustedError, UsageError)
    return MISUSED if isinstance(error, kinds) or type(error).__name__ == "QATConfigurationError" else FAILED


def explain(error: BaseException) -> str:
    """Return what to tell the user."""
    cause = error.__cause__
    if isinstance(error, KeyboardInterrupt):
        return "Interrupted. The same command goes on where it stopped, if it was lightning-qat compare."
    if isinstance(error, InstantiationException) and cause is not None:
        return f"{explain(cause)}\n({str(error).splitlines()[-1]})" if "full_key" in str(error) else explain(cause)
    if isinstance(error, MissingConfigException):
        return _explain_option(error)
    if isinstance(error, ConfigCompositionException) and cause is not None:
        return _explain_key(cause, str(error))
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key or error} must be given: add {error.full_key or 'it'}=... to the command."
    return str(error) or type(error).__name__


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return a sentence with the known names that come nearest, ``prefix`` before each, or with all if none does."""
    known = [each for each in dict.fromkeys(map(str, known)) if not each.startswith("_")]
    found = difflib.get_close_matches(name, known, n=2, cutoff=0.6)
    if found:
        return f"Did you mean {' or '.join(repr(prefix + each) for each in found)}?"
    return f"Known: {', '.join(sorted(known))}." if known else ""


def _explain_option(error: MissingConfigException) -> str:
    missing, options = str(error.missing_cfg_file or ""), error.options or []
    group, _, option = missing.rpartition("/")
    options = options or [each.removesuffix(".yaml") for each in _stored(group)]
    if not options:
        return str(error).partition("\n\nConfig search path")[0]
    return f"There is no {group}={option}. {nearest(option, options)}"


def _stored(group: str) -> list[str]:
    try:
        return ConfigStore.instance().list(group)
    except OSError:
        return []


def _explain_key(cause: BaseException, message: str) -> str:
    if isinstance(cause, ConfigAttributeError | ConfigKeyError):
        key = str(cause.full_key or cause.key)
        parent, name = cause.parent_node, key.rpartition(".")[2]
        known = [str(each) for each in parent] if isinstance(parent, DictConfig) else []
        return f"There is no {key!r}. {nearest(name, known, prefix=key[: -len(name)])}"
    if isinstance(cause, ValidationError):
        return f"{str(cause).splitlines()[0]} ({cause.full_key})"
    return f"{message}\n{cause}"
