"""Jobs by the Hydra launcher of the configuration: in this process, or by joblib, submitit, ray, ..."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from lightning_qat.cli.app import quote


def launch(
    task: Callable[[DictConfig], Any], cfg: DictConfig, jobs: Sequence[tuple[Path, Sequence[str]]], root: Path
) -> None:
    """Run a task once for each of ``jobs``, and wait for all of them.

    Args:
        task: Called with the configuration of the command, and the overrides of the job.
        cfg: The configuration of the command.
        jobs: Folder below ``root``, and overrides.
        root: The folder of the command.

    Raises:
        Exception: What the first job that failed has raised, after all have ended.
    """
    if not jobs:
        return
    hydra = HydraConfig.get()
    given = OmegaConf.to_container(hydra.overrides.task)
    assert isinstance(given, list)
    master = copy.deepcopy(cfg)
    with read_write(master), open_dict(master):
        master.hydra = copy.deepcopy(hydra)
    with read_write(master.hydra), open_dict(master.hydra):
        master.hydra.sweep.dir = str(root)
    context = HydraContext(config_loader=GlobalHydra.instance().config_loader(), callbacks=Callbacks())
    launcher = Plugins.instance().instantiate_launcher(hydra_context=context, task_function=task, config=master)
    overrides = [
        [*given, *of_job, f"hydra.sweep.dir={quote(root)}", f"hydra.sweep.subdir={quote(folder.relative_to(root))}"]
        for folder, of_job in jobs
    ]
    results = launcher.launch(overrides, initial_job_idx=0)
    for each in results:
        _ = each.return_value  # raises what the job has raised
