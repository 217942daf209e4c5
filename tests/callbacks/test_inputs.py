"""Quantized inputs in real runs: when they are calibrated, from what, and what happens then."""

import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_qat import PTQCallback, QATCallback, load_qat
from lightning_qat.callbacks.errors import QATConfigurationError
from lightning_qat.callbacks.rung_memory import RungMemory
from lightning_qat.callbacks.step_checkpoint import StepCheckpoint
from lightning_qat.core import QuantScheme, fake_quantize
from lightning_qat.nn import quantized_inputs, quantized_layers, static_inputs
from lightning_qat.observers import PercentileObserver, RunningMinMaxObserver
from tests.helpers import StopAt, TinyTask, batch_at, fit, loader, make_trainer


class Attention(nn.Module):
    """One block of a Llama: attention with a causal mask, and a gated MLP."""

    def __init__(self, width=16, hidden=32):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate_proj, self.up_proj = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(hidden, width, bias=False)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x):
        h = self.norm1(x)
        x = x + self.o_proj(
            nn.functional.scaled_dot_product_attention(self.q_proj(h), self.k_proj(h), self.v_proj(h), is_causal=True)
        )
        h = self.norm2(x)
        return x + self.down_proj(nn.functional.silu(self.gate_proj(h)) * self.up_proj(h))


class Transformer(TinyTask):
    """Says which token came before the last one."""

    def __init__(self, seed=0):
        super().__init__(seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = nn.Sequential(nn.Embedding(12, 16), Attention(), nn.LayerNorm(16))
            self.lm_head = nn.Linear(16, 12)

    def forward(self, x):
        return self.lm_head(self.net(x))

    def loss(self, x):
        tokens = (x.abs() * 7).long() % 12
        logits = self(tokens)
        return nn.functional.cross_entropy(logits[:, 1:].flatten(0, 1), tokens[:, :-1].flatten())


class Convnet(TinyTask):
    """Convolutions, batch normalization, ReLU."""

    def __init__(self, seed=0):
        super().__init__(seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = nn.Sequential(
                nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
                nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
                nn.Flatten(), nn.Linear(128, 8),
            )  # fmt: skip

    def forward(self, x):
        return self.net(x.view(-1, 1, 4, 4))


FIRST_AND_LAST = {
    Transformer: [],
    Convnet: [{"target": "net.0", "scheme": "w8a8-static"}, {"target": "net.7", "scheme": "w8a8-static"}],
}


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "w4a4", "w8a8-static", "w4a8-static", "w4a4-static", "w4a4-actsym"])
@pytest.mark.parametrize("model", [Transformer, Convnet])
def test_transformers_and_convnets_learn(model, scheme):
    task = model()
    qat = QATCallback(scheme, scale_lr=1e-3)
    trainer = fit(task, qat, max_steps=80)
    assert sum(task.losses[-8:]) < 0.8 * sum(task.losses[:8])
    assert all(map(math.isfinite, task.losses))
    inputs = {}
    for name, layer in quantized_layers(task).items():
        layer.input_fake_quant.register_forward_hook(lambda _, __, out, name=name: inputs.setdefault(name, out))
    assert math.isfinite(trainer.validate(task, loader(1), verbose=False)[0]["val/loss"])
    bits = int(scheme.split("a")[1][0])
    per_grid = {"static": lambda x: x.flatten()[None], "token": lambda x: x.flatten(end_dim=-2)}
    for name, x in inputs.items():
        is_conv = isinstance(task.get_submodule(name), nn.Conv2d)
        rows = per_grid["static"](x) if "static" in scheme else x.flatten(1) if is_conv else per_grid["token"](x)
        assert max(len(row.unique()) for row in rows) <= 2**bits
    assert len(inputs) == len(quantized_layers(task)) >= 3


def test_first_and_last_layers_may_have_their_own_rule(capsys):
    task = Convnet()
    rules = [{"target": "*", "scheme": "w2a2-static"}, *FIRST_AND_LAST[Convnet]]
    fit(task, QATCallback(rules, scale_lr=1e-2), max_steps=60)
    widths = {name: (layer.weight_fake_quant.num_bits, layer.input_fake_quant.num_bits)
              for name, layer in quantized_layers(task).items()}  # fmt: skip
    assert widths == {"net.0": (8, 8), "net.3": (2, 2), "net.7": (8, 8)}
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "2 layers at w8a8-static, 1 layer at w2a2-static (net.3)" in text
    assert "2 layers: 8 bits per tensor (static), asymmetric, calibrated in the steps before 6" in text
    assert "1 layer: 2 bits per tensor (static), asymmetric, calibrated in the steps before 6" in text
    assert "then learned" in text


class Grids(pl.Callback):
    """Records the grid of the first layer as each step is computed, and its learned parameters after it."""

    def __init__(self):
        self.scales, self.learned = [], []

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        quantizer = pl_module.net[0].input_fake_quant
        self.scales.append(quantizer.scale.item())

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.learned.append([p.item() for p in pl_module.net[0].input_fake_quant.parameters()])


@pytest.mark.parametrize("scale_lr", [None, 1e-2])
def test_grids_are_found_in_the_first_steps_then_frozen_or_learned(scale_lr):
    task, grids = TinyTask(), Grids()
    fit(
        task,
        QATCallback("w8a8-static", activation_observer="minmax", activation_calibration_steps=5, scale_lr=scale_lr),
        grids,
        max_steps=12,
    )
    ranges = [torch.cat([batch_at(step) for step in range(steps)]).aminmax() for steps in range(1, 6)]
    expected = [((high - low) / 255).item() for low, high in ranges]
    assert grids.scales == pytest.approx([1.0, *expected, *expected[-1:] * 6])
    quantizer = task.net[0].input_fake_quant
    assert quantizer.is_settled
    assert quantizer.num_steps == 5
    if scale_lr is not None:
        assert grids.learned[4] == [0.0, 0.0]  # not yet
        assert grids.learned[5][0] != 0.0
        assert len({tuple(each) for each in grids.learned[4:]}) == 8


def test_the_second_layer_sees_what_the_quantized_first_one_gives():
    task, observer = TinyTask(lr=0.0), RunningMinMaxObserver()
    fit(task, QATCallback("w2a2-static", activation_observer=observer, activation_calibration_steps=4), max_steps=10)
    scheme, first = QuantScheme(2, symmetric=False, granularity="tensor"), task.net[0]
    seen, hidden = observer.empty(), []
    for step in range(4):
        x = batch_at(step)
        x = x if step == 0 else fake_quantize(x, observer(seen, scheme), scheme)  # the first batch passed in float
        hidden.append(nn.functional.linear(x, first.fake_quantized_weight(), first.bias).relu())
        seen = observer.update(seen, observer.collect(batch_at(step)))
    ends = torch.cat(hidden).aminmax()
    assert torch.allclose(task.net[2].input_fake_quant.seen, torch.stack(ends))


class LooksAtOtherData(pl.Callback):
    """Runs the model on huge inputs wherever it can."""

    def _look(self, trainer, pl_module, *_):
        with torch.no_grad():
            pl_module(1e6 * torch.ones(2, 16))

    on_train_batch_end = on_validation_start = on_validation_batch_end = on_train_epoch_end = _look
    on_sanity_check_start = on_validation_end = on_train_start = on_before_optimizer_step = _look


class HugeValidation(TinyTask):
    """Is validated on inputs unlike those of training, its modules left in training mode by a hook of its own."""

    def validation_step(self, batch, batch_idx):
        self.train()
        self.log("val/loss", self.loss(1e6 * batch_at(batch_idx)))


@pytest.mark.parametrize("observer", ["minmax", "ema", "percentile", "mse"])
def test_observers_never_learn_from_other_data(observer):
    options = {"max_steps": 10, "val_check_interval": 1, "num_sanity_val_steps": 2}
    arguments = {"activation_observer": observer, "activation_calibration_steps": 6}
    disturbed, quiet = HugeValidation(), TinyTask()
    fit(disturbed, LooksAtOtherData(), QATCallback("w8a8-static", **arguments), LooksAtOtherData(), **options)
    fit(quiet, QATCallback("w8a8-static", **arguments), **options)
    assert disturbed.losses == quiet.losses
    for name, quantizer in static_inputs(disturbed).items():
        assert torch.equal(quantizer.seen, static_inputs(quiet)[name].seen)
        assert quantizer.seen[1] < 100


def test_a_model_that_trains_in_evaluation_mode_is_calibrated():
    class Frozen(TinyTask):
        def training_step(self, batch, batch_idx):
            self.net.eval()
            return super().training_step(batch, batch_idx)

    task, expected = Frozen(), TinyTask()
    for each in (task, expected):
        fit(each, QATCallback("w8a8-static", activation_observer="minmax", activation_calibration_steps=3), max_steps=8)
    assert torch.equal(task.net[0].input_fake_quant.seen, expected.net[0].input_fake_quant.seen)


def test_calibration_begins_when_inputs_are_quantized():
    task, grids = TinyTask(), Grids()
    qat = QATCallback(
        "w8a8-static", activation_observer="minmax", activation_calibration_steps=3, fake_quant_after_n_steps=4
    )
    fit(task, qat, grids, max_steps=12)
    assert grids.scales[:5] == [1.0] * 5
    assert len(set(grids.scales[5:])) <= 3
    low, high = torch.cat([batch_at(step) for step in range(4, 7)]).aminmax()
    assert task.net[0].input_fake_quant.seen.tolist() == [low.item(), high.item()]


def test_calibration_waits_for_inputs_whose_schedule_begins_later():
    schedule = {"name": "staggered", "weights": [4], "activations": {0: 16, 5: 8}}
    task, grids = TinyTask(), Grids()
    qat = QATCallback(
        "w4a8-static", activation_observer="minmax", activation_calibration_steps=2, schedule=schedule, scale_lr=1e-2
    )
    fit(task, qat, grids, max_steps=12)
    assert grids.scales[:6] == [1.0] * 6
    low, high = torch.cat([batch_at(5), batch_at(6)]).aminmax()
    assert task.net[0].input_fake_quant.seen.tolist() == [low.item(), high.item()]
    assert grids.learned[6] == [0.0, 0.0]
    assert grids.learned[7][0] != 0.0


def test_quantizers_that_go_back_to_before_the_end_of_their_calibration_go_on_with_it():
    class GoesBack(pl.Callback):
        def __init__(self):
            self.memory = RungMemory()

        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 2:
                self.memory.keep(pl_module, trainer.optimizers)
            elif trainer.global_step == 8:
                assert pl_module.net[0].input_fake_quant.is_settled
                self.memory.bring_back(pl_module, trainer.optimizers)

    task = TinyTask()
    qat = QATCallback("w8a8-static", activation_observer="minmax", activation_calibration_steps=4, scale_lr=1e-2)
    fit(task, qat, GoesBack(), max_steps=15)
    quantizer = task.net[0].input_fake_quant
    assert (quantizer.num_steps, quantizer.is_settled) == (4, True)
    low, high = torch.cat([batch_at(step) for step in (0, 1, 8, 9)]).aminmax()
    assert quantizer.seen.tolist() == [low.item(), high.item()]


def test_steps_are_optimizer_steps_under_accumulation_with_an_uneven_last_batch():
    task = TinyTask()
    qat = QATCallback("w8a8-static", activation_observer="minmax", activation_calibration_steps=3)
    trainer = fit(task, qat, max_epochs=3, num_batches=5, accumulate_grad_batches=2)
    assert trainer.global_step >= 6
    quantizer = task.net[0].input_fake_quant
    assert quantizer.num_steps == 3
    low, high = torch.cat([batch_at(index) for index in range(5)]).aminmax()  # steps of 2, 2 and 1 batches
    assert quantizer.seen.tolist() == [low.item(), high.item()]


def test_on_each_rung_the_grid_is_found_anew_and_learned_again():
    class Parts(pl.Callback):
        def __init__(self):
            self.ratios, self.states = {}, {}

        def on_train_batch_start(self, trainer, pl_module, *_):
            quantizer = pl_module.net[0].input_fake_quant
            self.ratios[trainer.global_step] = quantizer.log_scale_ratio.item()
            self.states[trainer.global_step] = quantizer.log_scale_ratio in trainer.optimizers[0].state

    task, parts = TinyTask(), Parts()
    qat = QATCallback(
        "w2a2-static",
        schedule={0: 8, 10: 4, 20: 2},
        activation_observer="minmax",
        activation_calibration_steps=4,
        scale_lr=1e-2,
        freeze_at=25,
    )
    fit(task, qat, parts, max_steps=30)
    zeros = [step for step, ratio in parts.ratios.items() if ratio == 0]
    assert zeros == [0, 1, 2, 3, 4, 10, 20]
    assert [step for step, has_state in parts.states.items() if not has_state] == zeros
    assert len({parts.ratios[step] for step in range(25, 30)}) == 1  # frozen
    quantizer = task.net[0].input_fake_quant
    assert quantizer.scale.item() == pytest.approx(((quantizer.seen[1] - quantizer.seen[0]) / 3).item())


def test_learned_grids_have_a_group_of_their_own_and_may_be_left_out():
    task = TinyTask()
    trainer = fit(task, QATCallback("w4a4-static", scale_lr=3e-3), max_steps=12)
    own = trainer.optimizers[0].param_groups[1]
    assert (own["lr"], own["weight_decay"]) == (3e-3, 0.0)
    assert {id(p) for q in static_inputs(task).values() for p in q.parameters()} <= {id(p) for p in own["params"]}
    assert len(own["params"]) == 2 + 2 * 2
    task = TinyTask()
    fit(task, QATCallback("w4a4-static", scale_lr=3e-3, learn_activations=False), max_steps=12)
    assert not any(list(quantizer.parameters()) for quantizer in static_inputs(task).values())


class Idle(TinyTask):
    """Has a layer that is first used in the step ``used_from``."""

    used_from = math.inf

    def __init__(self, seed=0):
        super().__init__(seed)
        self.expert = nn.Linear(16, 8)

    def forward(self, x):
        late = self.trainer.global_step >= self.used_from
        return self.net(x) + (self.expert(x) if late else 0)


@pytest.mark.filterwarnings("ignore:The first batch did not call")
def test_a_layer_without_inputs_is_told_of_and_calibrated_later():
    task = Idle()
    task.used_from = 8
    with pytest.warns(UserWarning, match=r"No input but zeros has reached expert in 3 steps of calibration.*ignore"):
        fit(
            task, QATCallback("w8a8-static", activation_observer="minmax", activation_calibration_steps=3), max_steps=12
        )
    low, high = batch_at(8).aminmax()
    assert task.expert.input_fake_quant.seen.tolist() == [low.item(), high.item()]
    assert task.expert.input_fake_quant.is_settled
    task = Idle()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(
            task, QATCallback("w8a8-static", activation_observer="minmax", activation_calibration_steps=3), max_steps=12
        )
    assert sum("has reached expert" in str(each.message) for each in caught) == 1
    with pytest.raises(QATConfigurationError, match="static inputs of expert are not calibrated"):
        trainer.validate(task, loader(1), verbose=False)
    with pytest.raises(ValueError, match="inputs of expert have no grid yet"):
        quantized_inputs(task)


def test_two_fits_and_a_fit_that_was_stopped_early_go_on_with_their_grids():
    task, qat = TinyTask(), QATCallback("w8a8-static", activation_observer="minmax", activation_calibration_steps=6)
    fit(task, qat, StopAt(2), max_steps=20)
    assert task.net[0].input_fake_quant.num_steps == 2
    fit(task, qat, max_steps=20)
    quantizer = task.net[0].input_fake_quant
    assert quantizer.num_steps == 6
    assert quantizer.is_settled
    scale = quantizer.scale.clone()
    fit(task, qat, max_steps=20)
    assert torch.equal(task.net[0].input_fake_quant.scale, scale)


def test_short_runs_are_calibrated_in_their_first_tenth():
    task = TinyTask()
    fit(task, QATCallback("w8a8-static"), max_steps=20)
    assert task.net[0].input_fake_quant.num_steps == 2
    task = TinyTask()
    fit(task, QATCallback("w8a8-static", scale_lr=1e-2), fast_dev_run=1)
    assert task.net[0].input_fake_quant.is_calibrated
    task = TinyTask()
    fit(
        task,
        QATCallback("w8a8-static", activation_observer="minmax", activation_calibration_steps=100, freeze_at=0.5),
        fast_dev_run=2,
    )
    assert task.net[0].input_fake_quant.num_steps == 2
    task = TinyTask()
    fit(task, QATCallback("w8a8-static"), max_steps=1)
    assert task.net[0].input_fake_quant.is_calibrated


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"activation_calibration_steps": 20}, "inputs are quantized in only 20 optimizer steps"),
        ({"activation_calibration_steps": 8, "fake_quant_after_n_steps": 15}, "quantized in only 5 optimizer steps"),
        ({"activation_calibration_steps": 8, "freeze_at": 7}, "calibrated until step 8, but scales freeze at step 7"),
    ],
)
def test_a_calibration_that_does_not_fit_the_run_is_refused(arguments, message):
    task = TinyTask()
    with pytest.raises(QATConfigurationError, match=message):
        fit(task, QATCallback("w8a8-static", **arguments), max_steps=20)
    assert task.losses == []


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"scheme": "w8a8", "activation_calibration_steps": 8}, ValueError, "no scheme has static inputs"),
        ({"scheme": "w8a8", "activation_observer": "ema"}, ValueError, "activation_observer='ema' has no effect"),
        ({"scheme": "w4", "learn_activations": True, "scale_lr": 1e-3}, ValueError, "no scheme has static inputs"),
        ({"scheme": "w8a8-static", "activation_calibration_steps": 0}, ValueError, "must be positive"),
        ({"scheme": "w8a8-static", "activation_calibration_steps": 2.5}, TypeError, "must be a whole number"),
        ({"scheme": "w8a8-static", "activation_observer": "emma"}, ValueError, "no activation observer 'emma'.*'ema'"),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments, error, message):
    with pytest.raises(error, match=message):
        QATCallback(**arguments)


def test_inputs_without_a_range_are_refused_by_name():
    class Broken(TinyTask):
        def training_step(self, batch, batch_idx):
            return self.loss(batch_at(batch_idx).index_fill(1, torch.tensor([0]), math.nan)).nan_to_num()

    with pytest.raises(QATConfigurationError, match=r"inputs of net.0, net.2 were NaN or infinite"):
        fit(Broken(), QATCallback("w8a8-static"), max_steps=20)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_a_model_without_grids_is_not_evaluated(stage):
    trainer, options = make_trainer(QATCallback("w8a8-static")), {} if stage == "predict" else {"verbose": False}
    with pytest.raises(QATConfigurationError, match=r"net.0, net.2 are not calibrated.*ckpt_path"):
        getattr(trainer, stage)(TinyTask(), loader(1), **options)


def test_manual_optimization_is_calibrated_on_every_forward_pass_of_a_batch():
    class Manual(TinyTask):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            for part in batch_at(batch_idx).chunk(2):
                optimizer.zero_grad()
                self.manual_backward(self.loss(part))
                optimizer.step()

    task = Manual()
    fit(task, QATCallback("w8a8-static", activation_observer="minmax", activation_calibration_steps=4), max_steps=20)
    low, high = torch.cat([batch_at(index) for index in range(4)]).aminmax()  # each batch counts once
    assert task.net[0].input_fake_quant.seen.tolist() == [low.item(), high.item()]


@pytest.mark.parametrize("at", [1, 2, 3, 5])
def test_resuming_is_exact_whatever_saves_first(at, tmp_path):
    """A callback that is listed first saves what was seen in the last batch before it is taken."""
    arguments = {"activation_observer": "mse", "activation_calibration_steps": 4, "scale_lr": 1e-2}
    whole, resumed = TinyTask(), TinyTask(seed=9)
    fit(whole, StepCheckpoint(tmp_path, [at]), QATCallback("w4a4-static", **arguments), max_steps=10)
    path = tmp_path / f"step{at}.ckpt"
    fit(resumed, QATCallback("w4a4-static", **arguments), max_steps=10, ckpt_path=path)
    assert resumed.losses == whole.losses[at:]
    for name, quantizer in static_inputs(resumed).items():
        assert torch.equal(quantizer.seen, static_inputs(whole)[name].seen)


def test_resuming_a_longer_run_does_not_calibrate_again(tmp_path):
    fit(TinyTask(), QATCallback("w4a4-static", scale_lr=1e-2), StepCheckpoint(tmp_path, [10]), max_steps=20)
    task, grids = TinyTask(), Grids()
    fit(task, QATCallback("w4a4-static", scale_lr=1e-2), grids, max_steps=600, num_batches=40,
        ckpt_path=tmp_path / "step10.ckpt")  # fmt: skip
    assert task.net[0].input_fake_quant.num_steps == 2
    assert len(set(grids.scales)) == 1


def test_checkpoints_from_before_there_were_static_inputs_load(tmp_path):
    task = TinyTask()
    fit(task, QATCallback("w4a8"), StepCheckpoint(tmp_path, [3]), max_steps=3)
    checkpoint = torch.load(tmp_path / "step3.ckpt", weights_only=True)
    for key in ("activation_observer", "learn_activations"):
        del checkpoint["lightning_qat"][key]
    loaded = load_qat(TinyTask(seed=5), checkpoint)
    assert torch.equal(loaded(batch_at(0)), task(batch_at(0)))
    torch.save(checkpoint, tmp_path / "old.ckpt")
    fit(TinyTask(), QATCallback("w4a8"), max_steps=5, ckpt_path=tmp_path / "old.ckpt")


def test_a_checkpoint_of_other_inputs_is_refused(tmp_path):
    fit(TinyTask(), QATCallback("w4a4-static", scale_lr=1e-3), StepCheckpoint(tmp_path, [3]), max_steps=12)
    for change, message in (
        ({"learn_activations": False}, "learn_activations is False, and was True"),
        ({"activation_observer": "minmax"}, "another activation_observer or scheme"),
    ):
        with pytest.raises(QATConfigurationError, match=message):
            fit(
                TinyTask(),
                QATCallback("w4a4-static", scale_lr=1e-3, **change),
                max_steps=12,
                ckpt_path=tmp_path / "step3.ckpt",
            )


class Calibrated(TinyTask):
    """Is calibrated on known batches."""

    def calibration_step(self, batch):
        self(batch_at(0))


class KeepsResults(PTQCallback):
    def _report(self, trainer, live, scores, results):
        super()._report(trainer, live, scores, results)
        self.kept = results


@pytest.mark.parametrize("methods", [("rtn",), ("rtn", "gptq")])
@pytest.mark.parametrize("with_qat", [True, False])
def test_quantization_after_training_calibrates_static_inputs_by_itself(with_qat, methods, tmp_path):
    qat = [QATCallback("w4a4-static", activation_observer="percentile")] if with_qat else []
    arguments = {} if with_qat else {"scheme": "w4a4-static", "activation_observer": "percentile"}
    ptq = KeepsResults(methods, calibration_samples=2, results=tmp_path / "results.jsonl", **arguments)
    data = DataLoader(torch.zeros(12, 1))
    make_trainer(*qat, ptq).fit(Calibrated(), data, data)
    assert {score.scheme for score in ptq.scores} == {"w4a4-static"}
    assert len(ptq.scores) == len(methods) + with_qat
    applied = ptq.kept.apply(Calibrated(), "rtn", 4)
    quantizer = applied.net[0].input_fake_quant
    assert quantizer.config.observer == PercentileObserver()
    assert quantizer.seen[:2].tolist() == [end.item() for end in batch_at(0).aminmax()]
    assert list(quantized_inputs(applied)) == ["net.0", "net.2"]


def test_under_ddp_all_ranks_have_the_grid_of_what_all_have_seen(tmp_path):
    observer = "mse"
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.callbacks.ddp_inputs", str(tmp_path), observer]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{observer}{rank}.pt", weights_only=True) for rank in (0, 1))
    for part in ("seen", "grids", "parameters"):
        for name, value in first[part].items():
            assert torch.equal(value, second[part][name]), name
    fed = torch.cat([first["fed"], second["fed"]])
    assert first["seen"]["net.0"][:2].tolist() == [fed[:, 0].min().item(), fed[:, 1].max().item()]
    assert (first["fed"][:, 1] < second["fed"][:, 1].max()).all()  # the ranks had seen different ranges
