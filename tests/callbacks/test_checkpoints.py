"""Resuming, portability, and loading without a Trainer."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_qat import QATCallback, load_qat, restore_float
from lightning_qat.callbacks.errors import QATConfigurationError
from lightning_qat.callbacks.step_checkpoint import StepCheckpoint
from lightning_qat.nn import quantized_layers
from tests.helpers import StopAt, TinyTask, fit, loader, make_trainer

RUNS = {
    "observed": {"scheme": "w2g16", "schedule": [8, 4, 3, 2], "freeze_at": 0.9},
    "learned": {"scheme": "w2g16", "schedule": [8, 4, 3, 2], "freeze_at": 0.9, "scale_lr": 1e-2},
    "costly": {"scheme": "w2", "schedule": [8, 2], "observer": {"name": "mse", "refresh_every_n_steps": 5}},
    "asymmetric": {"scheme": "w3-asym", "schedule": [8, 3], "scale_lr": 1e-2},
    "activations": {"scheme": "w4a8", "schedule": [16, 8, 4]},
    "without zero": {"scheme": "w2g16-nozero-bf16", "schedule": [4, 2], "freeze_at": 0.8},
    "late": {"scheme": "w4", "fake_quant_after_n_steps": 17, "freeze_at": 20},
    "static inputs": {
        "scheme": "w4a4-static",
        "schedule": [8, 4],
        "activation_observer": "mse",
        "activation_calibration_steps": 6,
    },
    "learned inputs": {
        "scheme": "w4a2-static",
        "schedule": {0: 16, 4: 8, 14: 4, 18: 2},
        "scale_lr": 1e-2,
        "activation_observer": "ema",
        "activation_calibration_steps": 8,
        "freeze_at": 20,
    },
}
STEPS = 24


def state_of(task):
    """Everything that must be equal to the bit."""
    state = {}
    for key, value in task.state_dict().items():
        parts = {f"{key}/{part}": entry for part, entry in value.items()} if isinstance(value, dict) else {key: value}
        state.update({name: None if entry is None else torch.as_tensor(entry) for name, entry in parts.items()})
    for name, layer in quantized_layers(task).items():
        params = layer.weight_fake_quant.qparams(layer.matrix())
        state[f"{name}/scale"], state[f"{name}/zero_point"] = params.scale, params.zero_point
    return state


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert (value is None and second[name] is None) or torch.equal(value, second[name]), name


@pytest.mark.parametrize("at", [1, 5, 6, 14, 22])
@pytest.mark.parametrize("name", RUNS)
def test_resuming_anywhere_is_bit_exact(name, at, tmp_path):
    whole = TinyTask()
    fit(whole, QATCallback(**RUNS[name]), StepCheckpoint(tmp_path, [at]), max_steps=STEPS)
    resumed = TinyTask(seed=99)
    fit(resumed, QATCallback(**RUNS[name]), max_steps=STEPS, ckpt_path=tmp_path / f"step{at}.ckpt")
    assert resumed.losses == whole.losses[at:]
    assert_same(state_of(whole), state_of(resumed))


@pytest.mark.parametrize("name", ["observed", "learned"])
def test_resuming_in_the_middle_of_an_epoch_with_accumulation(name, tmp_path):
    options = {"max_steps": STEPS, "accumulate_grad_batches": 2, "max_epochs": 3, "num_batches": 20}
    whole, resumed = TinyTask(optimizer="sgd"), TinyTask(seed=99, optimizer="sgd")
    fit(whole, QATCallback(**RUNS[name]), StepCheckpoint(tmp_path, [14]), **options)
    fit(resumed, QATCallback(**RUNS[name]), ckpt_path=tmp_path / "step14.ckpt", **options)
    assert resumed.losses == whole.losses[28:]
    assert_same(state_of(whole), state_of(resumed))


def test_a_stateful_loader_goes_on_where_it_was(tmp_path):
    class Numbered(loader):
        def __iter__(self):
            for position in super().__iter__():
                yield position + self.position

    class Seeing(TinyTask):
        def training_step(self, batch, batch_idx):
            self.seen = [*getattr(self, "seen", []), batch.item()]
            return super().training_step(batch, batch_idx)

    def seen(*callbacks, ckpt_path=None):
        task = Seeing()
        trainer = make_trainer(*callbacks, max_epochs=3)
        trainer.fit(task, Numbered(10), loader(2), ckpt_path=ckpt_path)
        return task.seen

    whole = seen(QATCallback("w4", freeze_at=0.9), StepCheckpoint(tmp_path, [17]))
    assert seen(QATCallback("w4", freeze_at=0.9), ckpt_path=tmp_path / "step17.ckpt") == whole[17:]


@pytest.mark.parametrize("name", RUNS)
def test_a_checkpoint_loads_strictly_without_the_plugin(name, tmp_path):
    task = TinyTask()
    fit(task, QATCallback(**RUNS[name]), StepCheckpoint(tmp_path, [14]), max_steps=STEPS)
    checkpoint = torch.load(tmp_path / "step14.ckpt", weights_only=True)
    plain = TinyTask(seed=99)
    plain.load_state_dict(checkpoint["state_dict"], strict=True)
    loaded = TinyTask.load_from_checkpoint(tmp_path / "step14.ckpt", strict=True)
    assert_same(plain.state_dict(), loaded.state_dict())
    with pytest.warns(UserWarning, match=r"add the following callbacks: \['QATCallback'\]"):
        assert make_trainer().validate(plain, loader(2), ckpt_path=tmp_path / "step14.ckpt", verbose=False)


@pytest.mark.filterwarnings("ignore:Training stopped at optimizer step")
@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("at", [5, 22])
def test_validating_a_checkpoint_gives_the_metric_of_the_run(name, at, tmp_path):
    """With the callback, and through load_qat."""
    task = TinyTask()
    callback = QATCallback(**RUNS[name])
    trainer = fit(task, callback, StopAt(at), max_steps=STEPS)
    assert trainer.global_step == at
    expected = trainer.validate(task, loader(2), verbose=False)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    fresh = make_trainer(QATCallback(**RUNS[name]))
    assert fresh.validate(TinyTask(seed=99), loader(2), ckpt_path=tmp_path / "last.ckpt", verbose=False) == expected
    rebuilt = load_qat(TinyTask(seed=99), tmp_path / "last.ckpt")
    assert make_trainer().validate(rebuilt, loader(2), verbose=False) == expected


def test_resuming_with_a_schedule_that_goes_back_up_is_warned_of(tmp_path):
    fit(TinyTask(), QATCallback("w2", schedule=[8, 2]), StepCheckpoint(tmp_path, [4]), max_steps=6)
    with pytest.warns(UserWarning, match="trained at 2 bits, and its run goes on at 8"):
        fit(TinyTask(), QATCallback("w2", schedule=[8, 2]), max_steps=20, ckpt_path=tmp_path / "step4.ckpt")


SCRIPT = """
import json, sys
sys.path.insert(0, {root!r})
from lightning_qat import QATCallback
from tests.helpers import TinyTask, loader, make_trainer
trainer = make_trainer(QATCallback(**json.loads({run!r})))
result = trainer.validate(TinyTask(seed=99), loader(2), ckpt_path={path!r}, verbose=False)
print("RESULT", json.dumps(result[0]["val/loss"].hex()))
"""


@pytest.mark.parametrize("name", ["learned", "costly"])
def test_validating_in_a_fresh_process_gives_the_same_metric_to_the_bit(name, tmp_path):
    task = TinyTask()
    path = tmp_path / f"step{STEPS}.ckpt"
    trainer = fit(task, QATCallback(**RUNS[name]), StepCheckpoint(tmp_path, [STEPS]), max_steps=STEPS)
    expected = trainer.validate(task, loader(2), verbose=False)[0]["val/loss"]
    root = str(Path(__file__).parents[2])
    script = SCRIPT.format(root=root, run=json.dumps(RUNS[name]), path=str(path))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env={**_one_thread()}, cwd=tmp_path
    )
    result = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    assert float.fromhex(json.loads(result.removeprefix("RESULT "))) == expected


def _one_thread():
    import os

    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scheme": "w2g8"}, "'net.0' is {num_bits: 2.*group_size: 8.*was {num_bits: 2.*group_size: 16"),
        ({"scheme": "w2g16a8"}, "'net.0' is {num_bits: 8.*was not quantized"),
        ({"ignore": ["net.2"]}, "'net.2' is not quantized, and was"),
        ({"scale_lr": 1e-3}, "learn_scales is True, and was False"),
    ],
)
def test_a_checkpoint_of_other_quantizers_is_refused(change, message, tmp_path):
    fit(TinyTask(), QATCallback(**RUNS["observed"]), StepCheckpoint(tmp_path, [5]), max_steps=STEPS)
    with pytest.raises(QATConfigurationError, match=f"{message}.*Use the arguments of that run"):
        fit(
            TinyTask(),
            QATCallback(**{**RUNS["observed"], **change}),
            max_steps=STEPS,
            ckpt_path=tmp_path / "step5.ckpt",
        )


def test_a_float_checkpoint_starts_qat_where_it_stopped(tmp_path):
    fit(TinyTask(), StepCheckpoint(tmp_path, [10]), max_steps=10)
    task = TinyTask(seed=99)
    fit(task, QATCallback("w4", observer="mse"), max_steps=STEPS, ckpt_path=tmp_path / "step10.ckpt")
    assert len(task.losses) == STEPS - 10
    with pytest.raises(QATConfigurationError, match=r"without quantizers.*Load only its weights"):
        fit(TinyTask(), QATCallback("w4", scale_lr=1e-3), max_steps=STEPS, ckpt_path=tmp_path / "step10.ckpt")


def test_a_float_checkpoint_is_quantized_from_its_own_weights(tmp_path):
    """Stored scales must come from the loaded weights, not from those the quantizers were made with."""
    float_task = TinyTask()
    fit(float_task, StepCheckpoint(tmp_path, [10]), max_steps=10)
    task = TinyTask(seed=99)
    trainer = make_trainer(QATCallback("w3", observer="mse"))
    loaded = trainer.validate(task, loader(2), ckpt_path=tmp_path / "step10.ckpt", verbose=False)
    direct = make_trainer(QATCallback("w3", observer="mse")).validate(float_task, loader(2), verbose=False)
    assert loaded == direct


def test_weights_only_checkpoints_keep_the_state_in_the_state_dict(tmp_path):
    task = TinyTask()
    trainer = fit(task, QATCallback(**RUNS["learned"]), max_steps=STEPS)
    expected = trainer.validate(task, loader(2), verbose=False)
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    fresh = make_trainer(QATCallback(**RUNS["learned"]))
    assert fresh.validate(TinyTask(seed=99), loader(2), ckpt_path=tmp_path / "weights.ckpt", verbose=False) == expected


def test_load_qat_tells_what_a_checkpoint_of_weights_alone_lacks(tmp_path):
    task, callback = TinyTask(), QATCallback("w4g16")
    trainer = fit(task, callback, max_steps=3)
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    with pytest.raises(ValueError, match=r"save_weights_only=True.*QATCallback\(...\).prepare"):
        load_qat(TinyTask(), tmp_path / "weights.ckpt")
    other = TinyTask(seed=99)
    callback.prepare(other)
    other.load_state_dict(torch.load(tmp_path / "weights.ckpt", weights_only=True)["state_dict"])
    assert_same(state_of(task), state_of(other))


class BuiltInConfigureModel(TinyTask):
    def __init__(self):
        super().__init__()
        self.net = None

    def configure_model(self):
        if self.net is None:
            self.net = TinyTask(seed=5).net


def test_load_qat_builds_what_configure_model_builds(tmp_path):
    task = BuiltInConfigureModel()
    fit(task, QATCallback("w4g16"), max_steps=3).save_checkpoint(tmp_path / "last.ckpt")
    assert_same(state_of(task), state_of(load_qat(BuiltInConfigureModel(), tmp_path / "last.ckpt")))


def test_load_qat_tells_that_a_model_is_not_built_yet(tmp_path):
    fit(TinyTask(), QATCallback("w4g16"), max_steps=3).save_checkpoint(tmp_path / "last.ckpt")
    unbuilt = TinyTask()
    del unbuilt.net
    with pytest.raises(ValueError, match=r"(?s)does not fit the module.*setup\(\) must be there.*net.0.weight"):
        load_qat(unbuilt, tmp_path / "last.ckpt")


def test_step_checkpoints_of_an_earlier_run_are_overwritten(tmp_path):
    saver = StepCheckpoint(tmp_path, [3])
    for seed in (0, 1):
        task = TinyTask(seed=seed)
        fit(task, saver, max_steps=3)
        saved = torch.load(saver.path(3), weights_only=True)["state_dict"]
        assert torch.equal(saved["net.0.weight"], task.net[0].weight)


def test_learned_scales_survive_a_state_dict_that_leaves_things_out(tmp_path):
    class Filtered(TinyTask):
        def __init__(self, seed=0):
            super().__init__(seed)
            self.strict_loading = False

        def state_dict(self, *args, **kwargs):
            return {k: v for k, v in super().state_dict(*args, **kwargs).items() if k.endswith(("weight", "bias"))}

    task = Filtered()
    fit(task, QATCallback("w4", scale_lr=1e-1), max_steps=5).save_checkpoint(tmp_path / "last.ckpt")
    ratio = task.net[0].weight_fake_quant.log_scale_ratio
    assert ratio.abs().min() > 0
    assert torch.equal(load_qat(Filtered(1), tmp_path / "last.ckpt").net[0].weight_fake_quant.log_scale_ratio, ratio)


def test_load_qat_reads_files_that_keep_the_quantizers_in_the_state_dict(tmp_path):
    task = TinyTask()
    trainer = fit(task, QATCallback("w4", scale_lr=1e-1), max_steps=3)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    content["state_dict"] |= content["lightning_qat"]["quantizers"]  # as sharded strategies do
    assert_same(state_of(load_qat(TinyTask(seed=9), content)), state_of(task))


def test_a_float_state_dict_gives_observed_layers_a_new_grid():
    task, other = TinyTask(), TinyTask(seed=5)
    with torch.no_grad():
        other.net[0].weight *= 3
    fit(task, QATCallback("w4", observer="mse"), max_steps=2)
    before = task.net[0].weight_fake_quant.scale.clone()
    task.load_state_dict(other.state_dict())
    QATCallback("w4", observer="mse").prepare(other)
    assert torch.equal(task.net[0].fake_quantized_weight(), other.net[0].fake_quantized_weight())
    assert not torch.equal(task.net[0].weight_fake_quant.scale, before)


def test_load_qat_respects_strict_loading(tmp_path):
    class Partial(TinyTask):
        def __init__(self, seed=0):
            super().__init__(seed)
            self.strict_loading = False

        def state_dict(self, *args, **kwargs):
            return {key: value for key, value in super().state_dict(*args, **kwargs).items() if "net.0.bias" not in key}

    task = Partial()
    fit(task, QATCallback("w4g16"), max_steps=3).save_checkpoint(tmp_path / "last.ckpt")
    assert torch.equal(load_qat(Partial(seed=9), tmp_path / "last.ckpt").net[2].weight, task.net[2].weight)


def test_load_qat_of_a_file_with_other_objects(tmp_path):
    trainer = fit(TinyTask(), QATCallback("w4g16"), max_steps=3)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    torch.save({**content, "hyper_parameters": {"path": tmp_path}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"could run code.*weights_only"):
        load_qat(TinyTask(), tmp_path / "other.ckpt")
    load_qat(TinyTask(), tmp_path / "other.ckpt", weights_only=False)


def test_load_qat_refuses_a_model_without_the_layers(tmp_path):
    fit(TinyTask(), QATCallback("w4"), StepCheckpoint(tmp_path, [2]), max_steps=2)
    checkpoint = torch.load(tmp_path / "step2.ckpt", weights_only=True)
    checkpoint["lightning_qat"]["layers"]["net.9"] = checkpoint["lightning_qat"]["layers"].pop("net.0")
    with pytest.raises(ValueError, match=r"quantizes 'net.9', which is not a quantizable layer"):
        load_qat(TinyTask(), checkpoint)
    checkpoint["lightning_qat"]["version"] = 99
    with pytest.raises(ValueError, match="newer lightning_qat"):
        load_qat(TinyTask(), checkpoint)


def test_missing_quantizer_state_is_refused(tmp_path):
    fit(TinyTask(), QATCallback("w4"), StepCheckpoint(tmp_path, [2]), max_steps=2)
    checkpoint = torch.load(tmp_path / "step2.ckpt", weights_only=True)
    checkpoint["lightning_qat"]["quantizers"].popitem()
    with pytest.raises(ValueError, match="damaged or incomplete"):
        load_qat(TinyTask(), checkpoint)


def test_a_model_whose_quantizers_were_taken_out_is_saved_as_a_float_model(tmp_path):
    task = TinyTask()
    trainer = fit(task, QATCallback("w4"), max_steps=2)
    restore_float(task)
    trainer.save_checkpoint(tmp_path / "float.ckpt")
    checkpoint = torch.load(tmp_path / "float.ckpt", weights_only=True)
    assert "lightning_qat" not in checkpoint
    TinyTask().load_state_dict(checkpoint["state_dict"], strict=True)
