"""One arm of a comparison, as a Hydra launcher runs it: trained unless that is done, and scored where it is not."""

from __future__ import annotations

import json
from pathlib import Path

import lightning.pytorch as pl
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from lightning_qat.cli.arms import ArmRunner, TrainedArm, load_trained, load_weights
from lightning_qat.cli.contest import ANNEALED, BASE, CONTROL, DIRECT, Contest, Point, differences
from lightning_qat.cli.explain import UsageError
from lightning_qat.cli.trust import build
from lightning_qat.nn import make_plan, restore_float
from lightning_qat.nn.sweep import sweep
from lightning_qat.ptq import build_methods
from lightning_qat.records import FLOAT_BASE, FLOAT_CONTROL, append_records, read_records

RECORDS = "records.jsonl"


def run_job(cfg: DictConfig) -> None:
    """Run the arm ``cfg.arm`` of the one seed in ``cfg.seeds``."""
    root = Path(HydraConfig.get().sweep.dir)
    contest = Contest(cfg, root, cfg.seeds[0])
    Job(contest, cfg.arm).run()


class Job:
    """An arm of a contest."""

    def __init__(self, contest: Contest, arm: str) -> None:
        self.contest, self.arm, self.folder = contest, arm, contest.folder(arm)

    def find_trained(self) -> TrainedArm | None:
        """Return what an earlier run left, or None.

        Raises:
            UsageError: If it was trained with other settings, or lacks a checkpoint.
        """
        trained = TrainedArm.read(self.folder)
        if trained is None:
            return None
        remedy = "Choose another folder (hydra.run.dir=...), or delete this arm to train it again."
        wanted = json.loads(json.dumps(self.contest.settings(self.arm)))
        if changes := differences(trained.settings, wanted):
            raise UsageError(f"{self.folder} was trained with other settings ({'; '.join(changes)}). {remedy}")
        missing = {point.step for point in self.contest.points_of(self.arm)} - set(trained.checkpoints)
        if missing and self.arm != BASE:
            raise UsageError(f"{self.folder} has no checkpoints of steps {sorted(missing)}. {remedy}")
        return trained

    def missing(self) -> list[tuple[str, Point]]:
        """Return the methods and points that have no record yet, in the order of the table."""
        path = self.folder / RECORDS
        records = read_records(path) if path.is_file() else []
        done = {(each.method, each.step, each.num_bits) for each in records}
        return [(name, at) for name, at in self._wanted() if (name, at.step, at.num_bits) not in done]

    def is_done(self) -> bool:
        """Return whether nothing is left to do."""
        return self.find_trained() is not None and not self.missing()

    def run(self) -> None:
        """Train and score what is missing."""
        trained = self.find_trained()
        if trained is not None and not self.missing():
            return
        runner = ArmRunner(self.contest.cfg, self.contest.seed)
        if trained is None:
            (self.folder / RECORDS).unlink(missing_ok=True)  # of weights that are gone
            trained = self._train(runner)
        _Scorer(self, runner, trained).score(self.missing())

    def _wanted(self) -> list[tuple[str, Point]]:
        points = self.contest.points_of(self.arm)
        if self.arm == BASE:
            return [(FLOAT_BASE, Point(0, 32))]
        if self.arm != CONTROL:
            return [(ANNEALED if self.arm == ANNEALED else DIRECT, point) for point in points]
        wanted: list[tuple[str, Point]] = []
        for point in points:
            wanted += [(FLOAT_CONTROL, Point(point.step, 32)), *((name, point) for name in self.contest.ptq_methods)]
        return list(dict.fromkeys(wanted))

    def _train(self, runner: ArmRunner) -> TrainedArm:
        cfg, contest = self.contest.cfg, self.contest
        if self.arm == BASE:
            start, phase = (Path(cfg.init_from) if cfg.init_from else None), cfg.base
        else:
            base = TrainedArm.read(contest.folder(BASE))
            if base is None:
                raise UsageError(f"There is no base in {contest.folder(BASE)} for the arm {self.arm} to start from.")
            start, phase = contest.folder(BASE) / base.last, cfg.finetune
        return runner.train(
            self.arm,
            phase,
            self.folder,
            init_from=start,
            callbacks=[*runner.make_callbacks(contest.callback_nodes(self.arm)).values()],
            checkpoint_steps={point.step for point in contest.points_of(self.arm) if self.arm != BASE},
            settings=contest.settings(self.arm),
        )


class _Scorer:
    """Turns checkpoints into records."""

    def __init__(self, job: Job, runner: ArmRunner, trained: TrainedArm) -> None:
        self.job, self.runner, self.trained = job, runner, trained
        self.contest = job.contest

    def score(self, missing: list[tuple[str, Point]]) -> None:
        if self.job.arm not in (BASE, CONTROL):
            callback = build(self.contest.callback_nodes(self.job.arm)["qat"])
            for method, point in missing:
                self._score_qat(method, point, callback)
            return
        for step in dict.fromkeys(point.step for _, point in missing):
            of_step = [(method, at.num_bits) for method, at in missing if at.step == step]
            floats = [method for method, bits in of_step if bits == 32]
            for method in floats:
                self._record(self._load_float(step), method, step, self.trained.seconds)
            self._score_ptq(step, [each for each in of_step if each[0] not in floats])

    def _score_ptq(self, step: int, wanted: list[tuple[str, float]]) -> None:
        """Score methods at widths; one pass over the calibration data serves all of a step."""
        if not wanted:
            return
        cfg, qat, task = self.contest.cfg, self.contest.qat, self._load_float(step).eval()
        plan = make_plan(task, qat.rules, qat.ignore, qat.target_module, qat.mapping)
        names, widths = (list(dict.fromkeys(column)) for column in zip(*wanted, strict=True))
        methods = build_methods([{"name": name, **cfg.ptq.get(name, {})} for name in names])
        batches = self.runner.calibration_batches(cfg.calibration_batches)
        calibration_step = getattr(task, "calibration_step", None)
        results = sweep(task, plan, batches, methods, widths, qat.observer, step=calibration_step)
        for method, num_bits in wanted:
            results.apply(task, method, num_bits)
            self._record(task, method, step, results.seconds(method, num_bits), num_bits)
            restore_float(task)

    def _score_qat(self, method: str, point: Point, callback: pl.Callback) -> None:
        checkpoint = self.job.folder / self.trained.checkpoints[point.step]
        task = load_trained(self.runner.make_task(), checkpoint, [callback])
        self._record(task, method, point.step, self.trained.seconds, point.num_bits)

    def _load_float(self, step: int) -> pl.LightningModule:
        task = self.runner.make_task()
        checkpoint = self.trained.last if self.job.arm == BASE else self.trained.checkpoints[step]
        task.load_state_dict(load_weights(self.job.folder / checkpoint))
        return task

    def _record(
        self, task: pl.LightningModule, method: str, step: int, seconds: float, num_bits: float | None = None
    ) -> None:
        append_records(self.job.folder / RECORDS, self.runner.make_record(task, method, step, seconds, num_bits))
