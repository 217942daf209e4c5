"""What a comparison consists of: its arms, the points at which they are scored, and what each arm depends on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lightning_qat.callbacks import QATCallback
from lightning_qat.callbacks.timeline import Timeline
from lightning_qat.cli.arms import ArmRunner
from lightning_qat.cli.explain import UsageError, nearest
from lightning_qat.cli.trust import build
from lightning_qat.core import PASS_THROUGH_BITS
from lightning_qat.nn.rules import Rule
from lightning_qat.ptq import PTQ_METHODS

BASE, CONTROL, DIRECT, ANNEALED = "base", "control", "qat", "qat_annealed"


@dataclass(frozen=True, order=True)
class Point:
    """A width and the optimizer step at which models of that width are compared."""

    step: int
    num_bits: float


class Contest:
    """The arms of one seed, read from the configuration of ``lightning-qat compare``.

    Args:
        cfg: The configuration.
        root: Folder of the comparison.
        seed: The seed.
    """

    def __init__(self, cfg: DictConfig, root: Path, seed: int) -> None:
        self.cfg, self.root, self.seed = cfg, root, seed
        self.bits = [float(bits) if bits % 1 else int(bits) for bits in _listed(cfg.bits, "bits")]
        methods = [str(each) for each in _listed(cfg.methods, "methods")]
        known = [*PTQ_METHODS, DIRECT, ANNEALED]
        for name in methods:
            if name not in known:
                raise UsageError(f"There is no method {name!r}. {nearest(name, known)}")
        # Recovery is measured from round-to-nearest.
        self.ptq_methods = list(dict.fromkeys(["rtn", *(name for name in methods if name in PTQ_METHODS)]))
        self._direct = {f"{DIRECT}_w{bits:g}": bits for bits in self.bits}
        self.qat_methods = [name for name in (DIRECT, ANNEALED) if name in methods]
        self.max_steps: int = cfg.finetune.trainer.max_steps
        self.qat: QATCallback = build(self._qat_node)

    @property
    def _qat_node(self) -> DictConfig:
        node = self.cfg.callbacks.get("qat")
        if node is None or not str(node.get("_target_", "")).endswith("QATCallback"):
            raise UsageError("lightning-qat compare needs callbacks.qat to be a QATCallback.")
        found: DictConfig = node
        return found

    @property
    def arms(self) -> list[str]:
        """Names of the arms that start from the base."""
        direct = self._direct if DIRECT in self.qat_methods else ()
        return [CONTROL, *direct, *([ANNEALED] if ANNEALED in self.qat_methods else [])]

    def folder(self, arm: str) -> Path:
        """Return the folder of an arm."""
        return self.root / "arms" / f"seed{self.seed}" / arm

    def points_of(self, arm: str) -> list[Point]:
        """Return where an arm is scored; the control is wherever another arm is, and without one at its end."""
        if arm == ANNEALED:
            return self._rungs
        if arm != CONTROL:
            return [Point(self.max_steps, self._direct[arm])] if arm in self._direct else []
        annealed = self._rungs if ANNEALED in self.qat_methods else []
        only_annealed = self.qat_methods == [ANNEALED]
        direct = [] if only_annealed else [Point(self.max_steps, bits) for bits in self.bits]
        return sorted({*annealed, *direct}, key=lambda point: (point.step, -point.num_bits))

    @cached_property
    def _rungs(self) -> list[Point]:
        """The width and the last step of each rung of the annealed arm.

        Raises:
            UsageError: If they are not known before training, the same for weights and inputs, and quantized in full.
        """
        callback: QATCallback = build(self.callback_nodes(ANNEALED)["qat"])
        timeline: Timeline = callback.resolve(self.max_steps)
        starts = timeline.rungs
        ends = [first for first, _ in starts[1:]] + [self.max_steps]
        check_rungs(timeline, ends[0])
        return [Point(end, bits) for (_, bits), end in zip(starts, ends, strict=True) if bits != PASS_THROUGH_BITS]

    def callback_nodes(self, arm: str) -> dict[str, Any]:
        """Return the nodes of the callbacks of an arm, in order: none for the base, for the control all but QAT."""
        if arm == BASE:
            return {}
        nodes = dict(self.cfg.callbacks)
        qat = OmegaConf.to_container(nodes.pop("qat") if arm == CONTROL else nodes["qat"], resolve=True)
        if arm == CONTROL:
            return nodes
        assert isinstance(qat, dict)
        if arm == ANNEALED:
            qat["schedule"] = qat.get("schedule") or sorted(self.bits, reverse=True)
        else:
            qat["scheme"], qat["schedule"] = self._scheme_at(self._direct[arm]), None
        nodes["qat"] = OmegaConf.create(qat)
        return nodes

    def _scheme_at(self, num_bits: float) -> list[dict[str, Any]]:
        """Return the rules of the recipe at a width, as an annealed run has them on that rung.

        Raises:
            UsageError: If the recipe's own width is larger.
        """
        widths = [rule.scheme.num_bits for rule in self.qat.rules if rule.scheme is not None]
        if num_bits < min(widths):
            raise UsageError(
                f"bits={num_bits:g} is less than the {min(widths):g} bits of callbacks.qat.scheme, which an arm ends "
                f"with. Give a scheme of {num_bits:g} bits; wider arms are made from it."
            )
        return [{"target": rule.target, "scheme": _at(rule, num_bits)} for rule in self.qat.rules]

    def settings(self, arm: str) -> dict[str, Any]:
        """Return what the weights and scores of an arm depend on, so that a finished one is not taken for another."""
        cfg = OmegaConf.to_container(self.cfg, resolve=False)
        assert isinstance(cfg, dict)
        phase = cfg["base" if arm == BASE else "finetune"]
        found = {
            "data": cfg["data"],
            "task": {**cfg["task"], **phase.get("task", {})},
            "trainer": {**cfg["trainer"], **phase["trainer"]},
            "callbacks": {name: OmegaConf.to_container(node) for name, node in self.callback_nodes(arm).items()},
            "seed": self.seed,
        }
        if arm == BASE:
            found["init_from"] = os.path.abspath(cfg["init_from"]) if cfg["init_from"] else None
        if arm == CONTROL:
            scored = {
                key: cfg["callbacks"]["qat"].get(key) for key in ("scheme", "ignore", "observer", "target_module")
            }
            found["scored"] = {**scored, "ptq": cfg["ptq"], "calibration_batches": cfg["calibration_batches"]}
        return {key: value for key, value in found.items() if value is not None}

    def check(self) -> None:
        """Try all arms before any of them is trained.

        Raises:
            UsageError: If one cannot work.
        """
        runner = ArmRunner(self.cfg, self.seed)
        for arm in [BASE, *self.arms]:
            self.points_of(arm)
            runner.make_callbacks(self.callback_nodes(arm))


def check_rungs(timeline: Timeline, first_end: int) -> None:
    """Check that at the end of each rung all quantizers are at one width that is known before training.

    Raises:
        UsageError: If they are not.
    """
    if timeline.monitor is not None or timeline.activation_rungs is not None or timeline.blend(first_end - 1) < 1:
        raise UsageError(
            "lightning-qat compare scores the annealed arm at the end of each rung, which must be known before "
            "training, the same for weights and inputs, and fake-quantized in full. Give a staircase, 'linear' or "
            f"'cosine', and let blend_until end in the first {first_end - 1} optimizer steps, or leave it out."
        )


def _listed(value: Any, name: str) -> list[Any]:
    entries = [value] if isinstance(value, int | float | str) else list(value)
    if not entries or len(set(entries)) < len(entries):
        raise UsageError(f"{name}={entries} must be one or more, each once.")
    return entries


def _at(rule: Rule, num_bits: float) -> str | None:
    if rule.scheme is None:
        return None
    return str(rule.scheme.at(max(num_bits, rule.scheme.num_bits)))


def differences(old: Any, new: Any, path: str = "") -> Sequence[str]:
    """Return what differs between two settings, as ``key: old -> new``."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        return [line for key in keys for line in differences(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))]
    return [] if old == new else [f"{path}: {old} -> {new}"]
