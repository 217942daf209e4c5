"""What is composed: from signatures, without torch; misspellings are noticed, and nothing is trusted."""

import inspect
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from lightning_qat.cli.nodes import CALLBACKS, LOGGERS, PART_GROUPS, TASK_GROUPS, store_all
from lightning_qat.cli.signatures import NO_DEFAULT, read_arguments, read_registry
from lightning_qat.observers import OBSERVERS
from lightning_qat.ptq import PTQ_METHODS

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
TARGETS = [
    "lightning.pytorch.Trainer",
    *CALLBACKS.values(),
    *LOGGERS.values(),
    *(path for registry, _ in TASK_GROUPS.values() for path in read_registry("lightning_qat.tasks", registry).values()),
    *(path for where in PART_GROUPS.values() for path in read_registry(*where).values()),
]


@pytest.mark.parametrize("target", TARGETS)
def test_arguments_read_from_source_are_those_of_the_signature(target):
    module, _, name = target.rpartition(".")
    parameters = inspect.signature(getattr(import_module(module), name)).parameters
    named = {key: each for key, each in parameters.items() if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)}
    arguments = {each.name: each for each in read_arguments(target)}
    assert set(arguments) <= set(named)
    for key, each in named.items():
        if key not in arguments:  # only a default that is no literal may be missing
            assert each.default is not inspect.Parameter.empty
            continue
        default = arguments[key].default
        assert default == (NO_DEFAULT if each.default is inspect.Parameter.empty else each.default)
    assert arguments or not named


def test_registries_are_stored_by_themselves():
    store_all()
    store = ConfigStore.instance()
    assert {name.removesuffix(".yaml") for name in store.list("callbacks/qat/observer")} == set(OBSERVERS)
    assert {name.removesuffix(".yaml") for name in store.list("ptq")} == set(PTQ_METHODS)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("command", ["train", "compare"])
def test_every_recipe_is_composed(command, recipe):
    with initialize_config_module(version_base="1.3", config_module="lightning_qat.conf"):
        cfg = compose(command, [f"recipe={recipe}"])
    assert {"name", "title", "metric", "data", "task", "trainer", "base", "finetune"} <= set(cfg)
    assert cfg.callbacks.qat._target_ == "lightning_qat.QATCallback"


def test_callbacks_keep_their_order_and_parts_of_qat_have_arguments():
    overrides = ["callbacks=[qat,early_stopping]", "callbacks.early_stopping.monitor=val/perplexity"]
    with initialize_config_module(version_base="1.3", config_module="lightning_qat.conf"):
        cfg = compose("train", [*overrides, "+callbacks/qat/observer=mse", "callbacks.qat.observer.num_steps=7"])
    assert list(cfg.callbacks) == ["qat", "early_stopping"]
    assert cfg.callbacks.qat.observer.name == "mse"
    assert cfg.callbacks.qat.observer.num_steps == 7


def run(*arguments, cwd, **environment):
    """Run the command line, and tell whether it loaded torch."""
    code = (
        "import sys; from lightning_qat.cli.main import main; sys.argv = ['lightning-qat', *sys.argv[1:]]\n"
        "code = main(); print('torch' in sys.modules); sys.exit(code)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **environment}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, env=environment, timeout=300)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "recipe=tiny"], "There is no recipe=tiny. Did you mean 'tiny_lm'?"),
        (["compare", "callbacks=[qta]"], "There is no callbacks=qta. Did you mean 'qat'"),
        (["compare", "callbacks.qat.shceme=w4"], "Did you mean 'callbacks.qat.scheme'?"),
        (["train", "trainer.max_epoch=3"], "Did you mean 'trainer.max_epochs' or 'trainer.min_epochs'?"),
        (
            ["train", "trainer.max_steps=many"],
            "'many' of type 'str' could not be converted to Integer (trainer.max_steps)",
        ),
        (["train", "data.val_fraction=all"], "data.val_fraction"),
        (["train", "task.model.dmi=3"], "Did you mean 'task.model.dim'?"),
        (["train", "seed=3"], "There is no 'seed'. Did you mean 'seeds'?"),
        (["train", "-m", "callbacks.qat.shceme=w4,w3"], "Did you mean 'callbacks.qat.scheme'?"),
        (["sweep", "recipe=tiny_lm,tiny"], "There is no recipe=tiny."),
        (["plot"], "results must be given"),
        (["plot", "none.jsonl"], "There is no file none.jsonl"),
        (["trian"], "There is no command 'trian'. Did you mean 'train'?"),
    ],
)
def test_what_is_misspelled_is_told_before_torch_is_loaded(arguments, message, tmp_path):
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stdout.splitlines()[-1] == "False"


HARMFUL = {
    "task": "task: {_target_: os.system, command: touch harmed}",
    "through our package": "task: {_target_: lightning_qat.cli.app.os.system, command: touch harmed}",
    "function of torch": "task: {_target_: torch.hub.load, repo_or_dir: x, model: y}",
    "nested": "data: {corpus: [{_target_: subprocess.Popen, args: [touch, harmed]}]}",
    "hydra callback": "hydra: {callbacks: {x: {_target_: os.system, command: touch harmed}}}",
    "through our callback": "hydra: {callbacks: {x: {_target_: lightning_qat.api.os.system, command: touch harmed}}}",
    "launcher": "hydra: {launcher: {_target_: os.abort}}",
    "logging": "hydra: {job_logging: {handlers: {x: {class: logging.os.system, command: touch harmed}}}}",
    "logging factory": "hydra: {job_logging: {formatters: {x: {(): os.system, command: touch harmed}}}}",
}


@pytest.mark.parametrize("content", HARMFUL.values(), ids=HARMFUL)
@pytest.mark.parametrize("command", ["train", "sweep"])
def test_a_recipe_from_elsewhere_cannot_run_what_it_likes(content, command, tmp_path):
    folder = tmp_path / "theirs" / "recipe"
    folder.mkdir(parents=True)
    head = "# @package _global_\ndefaults: [tiny_lm, _self_]\n"
    (folder / "evil.yaml").write_text(head + content)
    done = run(command, "--config-dir", "theirs", "recipe=evil", "logger=none", cwd=tmp_path)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "--trust" in done.stderr
    assert not (tmp_path / "harmed").exists()


def test_an_application_of_ones_own_uses_the_recipes(tmp_path):
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "mine.yaml").write_text(
        "defaults: [trainer: default, recipe: tiny_lm, _self_]\n"
        "hydra: {searchpath: ['pkg://lightning_qat.conf'], run: {dir: .}, output_subdir: null}\n"
        "trainer: {max_steps: 2}\ncallbacks: {qat: {scheme: w4g32}}\n"
    )
    (tmp_path / "mine.py").write_text(
        "import hydra\nfrom hydra.utils import instantiate\n\n\n"
        "@hydra.main(version_base='1.3', config_path='conf', config_name='mine')\n"
        "def main(cfg):\n"
        "    callbacks = [instantiate(each) for each in cfg.callbacks.values()]\n"
        "    print(callbacks[0].rules[0].scheme, cfg.trainer.max_steps, instantiate(cfg.task.model).blocks[0])\n\n\n"
        "main()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "mine.py", "callbacks.qat.freeze_at=0.5"],
        cwd=tmp_path, capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "w4g32 2 Block(" in done.stdout


def test_nodes_hold_what_the_constructors_take():
    store_all()
    node = ConfigStore.instance().load("callbacks/qat.yaml").node
    assert OmegaConf.is_missing(node, "scheme")
    assert "freeze_at" in node
