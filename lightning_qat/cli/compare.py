"""``lightning-qat compare``: does QAT pay here, and at which bits?

For every seed: a float base, then two arms that start from it and train for as many steps, a float control
and QAT. At the end of each rung QAT is compared with the control at the same step and with the control
quantized after training on the same grid, layers and data, calibrated on training data.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import lightning.pytorch as pl
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from lightning_qat.callbacks import QATCallback
from lightning_qat.callbacks.timeline import Timeline
from lightning_qat.cli.arms import ArmRunner, TrainedArm, load_trained, load_weights, read_seeds
from lightning_qat.core import PASS_THROUGH_BITS
from lightning_qat.nn import make_plan, restore_float
from lightning_qat.nn.bits import BitReport, bit_report
from lightning_qat.nn.sweep import sweep
from lightning_qat.ptq import RTN, build_methods
from lightning_qat.records import EvalRecord, append_records
from lightning_qat.tracking.report import report


@hydra.main(version_base="1.3", config_path="pkg://lightning_qat.conf", config_name="compare")
def main(cfg: DictConfig) -> None:
    """Run the comparison, and leave ``results.jsonl`` and ``quality_vs_bits.png`` in the output folder."""
    output_dir = Path(HydraConfig.get().runtime.output_dir)
    results = output_dir / "results.jsonl"
    results.unlink(missing_ok=True)
    for seed in read_seeds(cfg):
        compare_seed(cfg, seed, output_dir, functools.partial(append_records, results))
    report(results, output_dir / "quality_vs_bits.png", cfg.title)


def compare_seed(cfg: DictConfig, seed: int, output_dir: Path, save: Callable[[EvalRecord], None]) -> None:
    """Train the three arms of one seed and hand every record to ``save``.

    Args:
        cfg: The composed configuration.
        seed: The seed.
        output_dir: Where checkpoints go.
        save: Called with each record.
    """
    runner = ArmRunner(cfg, seed, output_dir)
    callbacks = runner.make_callbacks()
    qat = callbacks.get("qat")
    if not isinstance(qat, QATCallback):
        raise ValueError("lightning-qat compare needs callbacks.qat to be a QATCallback.")
    max_steps = cfg.finetune.trainer.max_steps
    timeline = qat.resolve(max_steps)
    starts = timeline.rungs
    ends = [first for first, _ in starts[1:]] + [max_steps]
    _check_rungs(timeline, ends[0])
    base = runner.train("base", cfg.base)
    others = [callback for callback in runner.make_callbacks().values() if not isinstance(callback, QATCallback)]
    control = runner.train("control", cfg.finetune, init_from=base.last, callbacks=others, checkpoint_steps=ends)
    trained = runner.train(
        "qat", cfg.finetune, init_from=base.last, callbacks=[*callbacks.values()], checkpoint_steps=ends
    )
    scorer = _Scorer(runner, qat, save)
    scorer.score_float("float_base", base, base.last, step=0)
    for (_, num_bits), step in zip(starts, ends, strict=True):
        scorer.score_float("float_control", control, control.checkpoints[step], step)
        if num_bits != PASS_THROUGH_BITS:
            scorer.score_ptq(control.checkpoints[step], num_bits, step)
        scorer.score_qat(trained, num_bits, step)


def _check_rungs(timeline: Timeline, first_end: int) -> None:
    """Check that at the end of each rung all quantizers are at one width that is known before training.

    Raises:
        ValueError: If they are not.
    """
    if timeline.monitor is not None or timeline.activation_rungs is not None or timeline.blend(first_end - 1) < 1:
        raise ValueError(
            "lightning-qat compare scores all arms at the end of each rung, which must be known before training, the "
            "same for weights and inputs, and fake-quantized in full. Give a staircase, 'linear' or 'cosine', and let "
            f"blend_until end in the first {first_end - 1} optimizer steps, or leave it out."
        )


class _Scorer:
    """Turns checkpoints into records."""

    def __init__(self, runner: ArmRunner, qat: QATCallback, save: Callable[[EvalRecord], None]) -> None:
        self.runner, self.qat, self.save = runner, qat, save
        methods: Any = OmegaConf.to_container(runner.cfg.ptq.methods)
        self.batches = runner.calibration_batches(runner.cfg.ptq.calibration_batches)
        self.methods = {"rtn": RTN(), **build_methods(methods)}  # recovery is measured from rtn

    def score_float(self, method: str, arm: TrainedArm, checkpoint: Path, step: int) -> None:
        task = self._load_float(checkpoint)
        self._record(task, method=method, step=step, trained_with="float", cost_seconds=arm.seconds)

    def score_ptq(self, checkpoint: Path, num_bits: float, step: int) -> None:
        task = self._load_float(checkpoint).eval()
        plan = make_plan(task, self.qat.rules, self.qat.ignore, self.qat.target_module, self.qat.mapping)
        calibration_step = getattr(task, "calibration_step", None)
        results = sweep(task, plan, self.batches, self.methods, [num_bits], self.qat.observer, step=calibration_step)
        for method in self.methods:
            results.apply(task, method, num_bits)
            seconds = results.seconds(method, num_bits)
            self._record(task, num_bits, method=method, step=step, trained_with="float", cost_seconds=seconds)
            restore_float(task)

    def score_qat(self, arm: TrainedArm, num_bits: float, step: int) -> None:
        task = load_trained(self.runner.make_task(), arm.checkpoints[step], [self.qat])
        self._record(task, num_bits, method="qat", step=step, trained_with="qat", cost_seconds=arm.seconds)

    def _load_float(self, checkpoint: Path) -> pl.LightningModule:
        task = self.runner.make_task()
        task.load_state_dict(load_weights(checkpoint))
        return task

    def _record(self, task: pl.LightningModule, num_bits: float | None = None, **fields: Any) -> None:
        bits = BitReport(32, 32) if num_bits is None else bit_report(task, num_bits)
        metric = self.runner.cfg.metric
        record = EvalRecord(
            scheme=self._scheme(num_bits),
            num_bits=num_bits or 32,
            effective_bits=bits.quantized,
            model_bits=bits.model,
            metric=metric.name,
            value=self.runner.score(task),
            higher_is_better=metric.higher_is_better,
            seed=self.runner.seed,
            data_hash=getattr(self.runner.data, "data_hash", None),
            **fields,
        )
        self.save(record)

    def _scheme(self, num_bits: float | None) -> str | None:
        if num_bits is None:
            return None
        schemes = {str(rule.scheme.at(num_bits)) for rule in self.qat.rules if rule.scheme is not None}
        return ", ".join(sorted(schemes))
