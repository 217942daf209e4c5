"""The sweep templates: what W&B's own agent makes of them is a command line that composes."""

import itertools
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from lightning_qat import PTQCallback, QATCallback

SWEEP = yaml.safe_load((Path(__file__).parents[1] / "recipes" / "sweeps" / "wandb_quality_vs_bits.yaml").read_text())


def commands():
    """All command lines of the grid, without /usr/bin/env, as W&B's agent puts them together."""
    names = list(SWEEP["parameters"])
    for values in itertools.product(*(SWEEP["parameters"][name]["values"] for name in names)):
        arguments = {name: {"value": value} for name, value in zip(names, values, strict=True)}
        macros = {**create_sweep_command_args({"args": arguments}), "env": [], "program": [SWEEP["program"]]}
        line = [macros.get(part[2:-1], [part]) for part in create_sweep_command(SWEEP["command"])]
        yield values, list(itertools.chain.from_iterable(line))


def test_the_grid_is_of_schemes_and_seeds():
    assert SWEEP["method"] == "grid"
    assert len(list(commands())) == 12


@pytest.mark.parametrize(("values", "line"), commands(), ids=lambda value: "-".join(map(str, value))[:24])
def test_every_command_composes(values, line):
    program, command, *overrides = line
    assert (program, command) == ("lightning-qat", "train")
    with initialize_config_module("lightning_qat.conf", version_base="1.3"):
        cfg = compose("train", overrides)
    scheme, seed = values
    assert (cfg.callbacks.qat.scheme, cfg.seeds, cfg.logger.offline) == (scheme, seed, False)
    qat, ptq = instantiate(cfg.callbacks.qat), instantiate(cfg.callbacks.ptq)
    assert isinstance(qat, QATCallback)
    assert isinstance(ptq, PTQCallback)
    assert qat.resolve(400).rungs[0][0] == 0
    assert len(qat.resolve(400).rungs) == 1
