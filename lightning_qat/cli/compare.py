"""``lightning-qat compare``: does QAT pay here, and at which bits?

For every seed: a float base, then arms that start from it and train for as many steps: a float control, QAT directly at
each width, and if asked for one QAT run annealed through all of them. Each QAT arm is compared with the control at the
same step and with the control quantized after training on the same grid, layers and data, calibrated on training data.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console

from lightning_qat.cli.app import quote, run_app

if TYPE_CHECKING:
    from lightning_qat.cli.contest import Contest


def main(arguments: Sequence[str]) -> int:
    """Run the comparison, and leave ``results.jsonl`` and ``quality_vs_bits.png`` in the output folder."""
    return run_app(compare, "compare", arguments)


def compare(cfg: DictConfig) -> None:
    """Run what is missing of a comparison, then report all of it."""
    from lightning_qat.cli.arms import read_seeds
    from lightning_qat.cli.contest import BASE, Contest
    from lightning_qat.cli.job import Job, run_job
    from lightning_qat.cli.launch import launch

    root = Path(HydraConfig.get().runtime.output_dir)
    contests = [Contest(cfg, root, seed) for seed in read_seeds(cfg)]
    contests[0].check()
    # A job may run elsewhere.
    init_from = "null" if cfg.init_from is None else quote(os.path.abspath(cfg.init_from))
    bases = [(contest, BASE) for contest in contests]
    others = [(contest, arm) for contest in contests for arm in contest.arms]
    for what, arms in (("bases", bases), ("arms", others)):
        jobs = [(contest, arm) for contest, arm in arms if not Job(contest, arm).is_done()]
        if done := len(arms) - len(jobs):
            Console().print(f"{done} of {len(arms)} {what} are there already.")
        overrides = [
            (contest.folder(arm), [f"arm={arm}", f"seeds=[{contest.seed}]", f"init_from={init_from}"])
            for contest, arm in jobs
        ]
        launch(run_job, cfg, overrides, root)
    _report(cfg, contests, root)


def _report(cfg: DictConfig, contests: Sequence[Contest], root: Path) -> None:
    from lightning_qat.cli.arms import open_wandb
    from lightning_qat.cli.contest import BASE
    from lightning_qat.cli.job import RECORDS
    from lightning_qat.records import read_records, write_records
    from lightning_qat.tracking.report import report
    from lightning_qat.tracking.tables import LABELS

    records = []
    for contest in contests:
        for arm in (BASE, *contest.arms):
            records += read_records(contest.folder(arm) / RECORDS)
    order = {name: index for index, name in enumerate(LABELS)}
    wanted = {name for contest in contests for name in (*contest.ptq_methods, *contest.qat_methods)}
    widths = {
        (point.step, point.num_bits) for contest in contests for arm in contest.arms for point in contest.points_of(arm)
    }
    records = [
        record
        for record in records
        if record.num_bits == 32 or (record.method in wanted and (record.step, record.num_bits) in widths)
    ]
    records.sort(key=lambda each: (each.seed, each.step, -each.num_bits, order.get(each.method, len(order))))
    write_records(root / "results.jsonl", *records)
    logger = open_wandb(cfg, "results", job_type="report", seeds=[contest.seed for contest in contests])
    report([root / "results.jsonl"], root / "quality_vs_bits.png", cfg.title)
    if logger is not None:
        logger.experiment.finish()
