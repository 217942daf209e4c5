"""PTQCallback: right numbers, and training as if it were not there."""

import contextlib
import copy
import csv
import gc
import os
import random
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch import callbacks as pl_callbacks
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanSquaredError

from lightning_qat import PTQCallback, QATCallback, quantize_model
from lightning_qat.callbacks.errors import QATConfigurationError
from lightning_qat.callbacks.isolation import isolate_randomness
from lightning_qat.core import QuantizedWeight
from lightning_qat.nn import quantized_layers
from lightning_qat.records import read_records
from tests.helpers import make_trainer

EMA = getattr(pl_callbacks, "EMAWeightAveraging", None)


@dataclass(frozen=True)
class Unchanged(QuantizedWeight):
    """A weight that was not quantized at all."""

    weight: Tensor | None = None

    def dequantize(self):
        return self.weight


class Identity:
    """Quantizes to the weight itself."""

    needs_stats = True

    def __call__(self, weight, schemes, observer, stats=None):
        return [
            Unchanged(torch.zeros(1, 1), observer(weight, scheme), scheme, weight=weight.clone()) for scheme in schemes
        ]


class Task(pl.LightningModule):
    """Everything that a second validation could disturb: metrics, lists, dropout, several loaders."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 4))
        self.metric = MeanSquaredError()
        self.outputs = []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = nn.functional.mse_loss(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        output = self(batch[0])
        self.outputs.append(output)
        self.log("val_loss", nn.functional.mse_loss(output, batch[1]))
        self.metric(output, batch[1])
        self.log("val_metric", self.metric)

    def on_validation_epoch_end(self):
        self.log("val_spread", torch.cat(self.outputs).std())
        self.outputs.clear()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


class Noisy(torch.utils.data.Dataset):
    """Adds noise to what it returns, as augmentation does."""

    def __init__(self, size, seed):
        generator = torch.Generator().manual_seed(seed)
        self.x, self.y = (torch.randn(size, n, generator=generator) for n in (8, 4))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index] + 0.01 * torch.randn(8) + random.random() + np.random.rand() * 0, self.y[index]


def make_loaders(num_val=1, num_workers=0, shared=False):
    generator = torch.Generator().manual_seed(5) if shared else None
    options = {"generator": generator, "num_workers": num_workers, "persistent_workers": num_workers > 0}
    train = DataLoader(Noisy(48, 1), batch_size=8, shuffle=True, **options)
    val = [DataLoader(Noisy(21, 2 + n), batch_size=8, shuffle=shared, **options) for n in range(num_val)]
    return train, val[0] if num_val == 1 else val


def run(folder, *callbacks, epochs=3, make=make_loaders, task=None, **trainer):
    pl.seed_everything(3, verbose=False)
    task = (task or Task)() if task is None or isinstance(task, type) else task
    checkpoint = pl_callbacks.ModelCheckpoint(
        folder / "ckpt", monitor=trainer.pop("monitor", "val_loss"), save_last=True
    )
    fitted = make_trainer(
        *callbacks, checkpoint, max_epochs=epochs, logger=CSVLogger(folder), default_root_dir=folder,
        enable_checkpointing=True, log_every_n_steps=2,
        **{"num_sanity_val_steps": 1, "max_steps": -1, **trainer},
    )  # fmt: skip
    train, val = make()
    fitted.fit(task, train, val)
    return task, fitted, checkpoint


def everything(folder, task, trainer, checkpoint):
    """All that must be the same to the bit, as nested primitives and tensors."""
    saved = torch.load(checkpoint.last_model_path, weights_only=False)
    with open(trainer.logger.experiment.metrics_file_path) as file:
        rows = [{k: v for k, v in row.items() if v and not k.startswith("ptq")} for row in csv.DictReader(file)]
    rows = [row for row in rows if set(row) - {"step", "epoch"}]
    saved["callbacks"] = {k: v for k, v in saved["callbacks"].items() if "PTQ" not in k}
    text = repr([saved["callbacks"], saved["loops"]]).replace(str(folder), "")
    return {
        "state_dict": saved["state_dict"],
        "optimizer": saved["optimizer_states"],
        "text": text,
        "logged": rows,
        "metrics": {k: v for k, v in trainer.callback_metrics.items() if not k.startswith("ptq")},
        "rng": [torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()],
        "best": float(checkpoint.best_model_score),
        "files": sorted(path.name for path in (folder / "ckpt").iterdir()),
    }


def assert_same(first, second, where=""):
    assert type(first) is type(second), where
    if isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_same(first[key], second[key], f"{where}/{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), where
        for index, pair in enumerate(zip(first, second, strict=True)):
            assert_same(*pair, f"{where}/{index}")
    elif isinstance(first, Tensor):
        assert torch.equal(first, second), where
    else:
        assert first == second, where


SETUPS = {
    "plain": {},
    "several loaders": {"make": lambda: make_loaders(num_val=2), "monitor": "val_loss/dataloader_idx_1"},
    "shared generator": {"make": lambda: make_loaders(shared=True)},
    "persistent workers": {"make": lambda: make_loaders(num_workers=1)},
    "validation within the epoch": {"val_check_interval": 2},
    "accumulation": {"accumulate_grad_batches": 2},
    "limited": {"limit_val_batches": 2},
}


@pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*log_every_n_steps", "ignore:.*multi-threaded", "ignore:.*shuffling"
)
@pytest.mark.parametrize("with_qat", [False, True])
@pytest.mark.parametrize("name", SETUPS)
def test_training_is_undisturbed(name, with_qat, tmp_path):
    qat = [QATCallback("w2", schedule=[8, 4, 2], freeze_at=0.9, scale_lr=1e-2)] if with_qat else []
    options = SETUPS[name]
    without = run(tmp_path / "without", *copy.deepcopy(qat), **options)
    expected = everything(tmp_path / "without", *without)
    ptq = PTQCallback(("rtn", "awq", "gptq"), bits=None if with_qat else (4, 2), calibration_samples=16)
    found = run(tmp_path / "with", *qat, ptq, **options)
    assert_same(everything(tmp_path / "with", *found), expected)
    assert len(ptq.scores) >= 9
    assert not any(key.startswith("ptq") for key in expected["metrics"])


@pytest.mark.skipif(EMA is None, reason="this Lightning has no EMAWeightAveraging")
@pytest.mark.parametrize("order", [1, -1])
def test_with_an_average_it_is_the_average_that_is_quantized(order, tmp_path):
    without = run(tmp_path / "without", EMA(decay=0.8), make=quiet_loaders)
    expected = everything(tmp_path / "without", *without)
    ptq = PTQCallback({"same": Identity()}, bits=4)
    found = run(tmp_path / "with", *[ptq, EMA(decay=0.8)][::order], make=quiet_loaders)
    assert_same(everything(tmp_path / "with", *found), expected)
    assert ptq.scores[-1].metrics["val_metric"] == float(expected["metrics"]["val_metric"])


class Quiet(torch.utils.data.Dataset):
    """Like ``Noisy`` without noise, so that two passes see the same."""

    def __new__(cls, size, seed):
        noisy = Noisy(size, seed)
        return TensorDataset(noisy.x, noisy.y)


@pytest.mark.parametrize("num_val", [1, 2])
@pytest.mark.parametrize("with_qat", [False, True])
def test_an_unchanged_copy_scores_what_lightning_logged(num_val, with_qat, tmp_path):
    class Deterministic(Task):
        """Validates the float weights underneath, which is what the copy has."""

        def on_validation_epoch_start(self):
            for layer in quantized_layers(self).values():
                layer.weight_fake_quant.set_num_bits(16)

    def make():
        val = [DataLoader(Quiet(21, 2 + n), batch_size=8) for n in range(num_val)]
        return DataLoader(Quiet(48, 1), batch_size=8), val[0] if num_val == 1 else val

    ptq = PTQCallback({"same": Identity()}, bits=4)
    qat = [QATCallback("w4")] if with_qat else []
    monitor = "val_loss" if num_val == 1 else "val_loss/dataloader_idx_0"
    _, trainer, _ = run(tmp_path, *qat, ptq, epochs=1, make=make, task=Deterministic(), monitor=monitor)
    logged = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val")}
    scored = next(score for score in ptq.scores if score.method != "qat").metrics
    assert scored == logged
    assert len(scored) == 2 * num_val + 1


def quiet_loaders():
    return DataLoader(Quiet(48, 1), batch_size=8), DataLoader(Quiet(21, 2), batch_size=8)


def test_scores_are_those_of_the_model_quantized_by_hand(tmp_path):
    ptq = PTQCallback(("rtn", "gptq", "awq", "imatrix"), bits=(4, 3, 2), calibration_samples=20)
    task, _, _ = run(tmp_path, ptq, epochs=1, make=quiet_loaders)
    train, val = quiet_loaders()
    batches = [batch for _, batch in zip(range(3), train, strict=False)]  # 24 samples: whole batches
    task.eval()
    results = quantize_model(task, batches, methods=tuple(ptq.methods), bits=(4, 3, 2), progress=False)
    assert len(ptq.scores) == 12
    for score in ptq.scores:
        twin = copy.deepcopy(task)
        results.apply(twin, score.method, score.num_bits)
        (expected,) = make_trainer().validate(twin, val, verbose=False)
        assert score.metrics == expected
        assert score.bits.quantized > score.num_bits


def test_metrics_go_to_loggers_records_and_callbacks_that_monitor(tmp_path, capsys):
    ptq = PTQCallback(("rtn", "gptq"), bits=(4, 2), mode={"val_metric": "max"}, seed=7)
    stopping = pl_callbacks.EarlyStopping("ptq/gptq_w2/val_loss", patience=0, min_delta=10.0)
    _, trainer, checkpoint = run(tmp_path, ptq, stopping, make=quiet_loaders, monitor="ptq/current/gptq/val_loss")
    assert trainer.current_epoch == 2  # stopped: it never improves by 10
    assert float(checkpoint.best_model_score) == min(
        score.metrics["val_loss"] for score in ptq.scores if (score.method, score.num_bits) == ("gptq", 2)
    )
    with open(trainer.logger.experiment.metrics_file_path) as file:
        columns = next(csv.reader(file))
    assert {"ptq/rtn_w4/val_loss", "ptq/gptq_w2/val_metric", "ptq/current/rtn/val_spread"} <= set(columns)
    records = read_records(tmp_path / "ptq_results.jsonl")
    assert len(records) == (1 + 2 * 2) * 3 * 2  # the live model, methods and widths; metrics, validations
    assert {r.step for r in records} == {6, 12}
    assert all(r.trained_with == "float" and r.seed == 7 for r in records)
    assert [r.method for r in records if r.cost_seconds is None] == ["float_control"] * 6
    assert [r.value for r in records[-15:-12]] == [float(trainer.callback_metrics[r.metric]) for r in records[-15:-12]]
    assert all(r.higher_is_better == (r.metric == "val_metric") for r in records)
    assert "Quantization after training, step 12" in capsys.readouterr().out


def test_beside_qat_rows_are_of_latent_weights_at_the_width_that_qat_is_at(tmp_path, capsys):
    ptq = PTQCallback("rtn")
    qat = QATCallback("w2", schedule={0: 16, 6: 4, 12: 2})
    _, trainer, _ = run(tmp_path, qat, ptq, make=quiet_loaders)
    rows = [(score.method, score.num_bits) for score in ptq.scores]
    # The first validation is before fake quantization: it is left out.
    assert rows == [("qat", 4), ("ptq_of_latent/rtn", 4), ("qat", 2), ("ptq_of_latent/rtn", 2)]
    # Min-max scales follow the weight, so rounding the latent weights is what QAT computes.
    for live, latent in zip(ptq.scores[::2], ptq.scores[1::2], strict=True):
        assert live.metrics == latent.metrics
        assert live.bits == latent.bits
    assert "ptq_of_latent/current/rtn/val_loss" in trainer.callback_metrics
    assert {r.method for r in read_records(tmp_path / "ptq_results.jsonl")} == {"qat", "ptq_of_latent/rtn"}


def test_every_n_validations_and_limits(tmp_path, recwarn):
    ptq = PTQCallback(("rtn", "gptq"), bits=4, every_n_validations=2, limit_val_batches=1, max_seconds=0)
    run(tmp_path, ptq, epochs=4, make=quiet_loaders)
    assert ptq.scores == []
    assert any("ran out of max_seconds=0 before rtn at 4 bits, gptq at 4 bits" in str(w.message) for w in recwarn)
    assert ptq._num_validations == 4


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
def test_it_works_in_the_precision_of_the_trainer(precision, tmp_path):
    ptq = PTQCallback(("rtn", "imatrix", "awq", "gptq"), bits=(8, 2), calibration_samples=8)
    _, trainer, _ = run(tmp_path, ptq, make=quiet_loaders, epochs=1, precision=precision)
    live = float(trainer.callback_metrics["val_loss"])
    for score in ptq.scores:
        assert score.metrics["val_loss"] == pytest.approx(live, rel=0.01 if score.num_bits == 8 else 0.5)


@pytest.mark.parametrize(
    ("trainer", "expected"),
    [
        ({"epochs": 2}, [4, 8, 4, 2]),
        ({"epochs": 3, "max_steps": 12}, [4, 8, 4, 2]),
        ({"epochs": 1, "val_check_interval": 3}, [4, 8, 4, 2]),
        ({"epochs": 1, "val_check_interval": 4}, [4]),
    ],
)
def test_the_last_validation_may_sweep_more(trainer, expected, tmp_path, recwarn):
    ptq = PTQCallback("rtn", bits=4, final_bits=(8, 4, 2))
    run(tmp_path, ptq, make=quiet_loaders, **trainer)
    assert [score.num_bits for score in ptq.scores] == expected
    assert any("has not swept final_bits" in str(w.message) for w in recwarn) == (len(expected) == 1)


def test_the_gap_to_the_best_of_a_float_run_is_logged(tmp_path):
    ptq = PTQCallback(("rtn", "gptq"), bits=(4, 2), mode={"val_spread": "max"})
    run(tmp_path / "float", ptq, make=quiet_loaders, epochs=2)
    path = tmp_path / "float" / "ptq_results.jsonl"
    second = PTQCallback("rtn", baseline=path)
    _, trainer, _ = run(tmp_path / "qat", QATCallback("w2", schedule=[4, 2]), second, make=quiet_loaders, epochs=2)
    live = second.scores[-2]
    of_float = [score.metrics for score in ptq.scores[-4:] if score.num_bits == 2]
    for name, best in (("val_loss", min), ("val_spread", max)):
        gap = float(trainer.callback_metrics[f"gap_to_best_ptq/{name}"])
        assert gap == pytest.approx(live.metrics[name] - best(metrics[name] for metrics in of_float))
    with pytest.raises(ValueError, match="holds no results of quantization after training of a float run"):
        PTQCallback("rtn", baseline=tmp_path / "qat" / "ptq_results.jsonl")


def test_standalone_validation_needs_and_takes_calibration_data(tmp_path):
    train, val = quiet_loaders()
    task = Task()
    with pytest.raises(QATConfigurationError, match=r"gptq need inputs.*calibration_data"):
        make_trainer(PTQCallback("gptq", bits=4)).validate(task, val, verbose=False)
    ptq = PTQCallback("gptq", bits=4, calibration_data=list(train), results=tmp_path / "r.jsonl")
    before = copy.deepcopy(task.state_dict())
    expected = make_trainer().validate(task, val, verbose=False)
    assert make_trainer(ptq).validate(task, val, verbose=False) == expected
    assert_same(dict(task.state_dict()), dict(before))
    assert len(ptq.scores) == 1


def test_a_module_may_say_how_it_is_calibrated(tmp_path):
    class Named(Task):
        def forward(self, x, scale):
            return self.net(x) * scale

        def calibration_step(self, batch):
            seen.append(len(batch[0]))
            return self.net(batch[0])

        def training_step(self, batch, batch_idx):
            return nn.functional.mse_loss(self(batch[0], 1.0), batch[1])

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", nn.functional.mse_loss(self(batch[0], 1.0), batch[1]))

        def on_validation_epoch_end(self):
            pass

    seen = []
    run(tmp_path, PTQCallback("gptq", bits=4, calibration_samples=16), epochs=1, make=quiet_loaders, task=Named())
    assert seen == [8, 8, 8, 8]  # the first batch once at once, and once more to see what is shared


# ------------------------------------------------------------------------------- modules that do unusual things


class Unusual(Task):
    """Keeps a loss, steps a scheduler and asks to stop in validation, and clears its list late."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.automatic_optimization = False
        self.seen = []

    def forward(self, x):
        return self.net(self.norm(x))

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.last_loss = nn.functional.mse_loss(self(batch[0]), batch[1])
        self.manual_backward(self.last_loss)
        optimizer.step()

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.seen.append(batch_idx)
        self.log("hidden", float(len(self.seen)), logger=False, reduce_fx="max")

    def on_validation_epoch_end(self):
        super().on_validation_epoch_end()
        self.lr_schedulers().step()
        assert self.trainer.checkpoint_callback is not None
        assert Path(self.logger.log_dir)
        if self.trainer.current_epoch == 2:
            self.trainer.should_stop = True

    def on_validation_end(self):
        self.seen.clear()

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), 1e-2)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


def test_what_the_hooks_of_the_module_change_is_put_back(tmp_path):
    without = run(tmp_path / "without", make=quiet_loaders, task=Unusual, epochs=5, num_sanity_val_steps=0)
    expected = everything(tmp_path / "without", *without)
    ptq = PTQCallback({"rtn": {"name": "rtn"}, "same": Identity()}, bits=(4, 2))
    found = run(tmp_path / "with", ptq, make=quiet_loaders, task=Unusual, epochs=5, num_sanity_val_steps=0)
    assert_same(everything(tmp_path / "with", *found), expected)
    assert found[1].optimizers[0].param_groups[0]["lr"] == 1e-2 * 0.5**3
    assert {score.metrics["hidden"] for score in ptq.scores} == {3.0}  # as in the live validation


@pytest.mark.skipif(EMA is None, reason="this Lightning has no EMAWeightAveraging")
def test_buffers_of_an_average_are_those_that_were_validated(tmp_path):
    class Normed(Task):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(8)

        def forward(self, x):
            return self.net(self.norm(x))

    ptq = PTQCallback({"same": Identity()}, bits=4)
    _, trainer, _ = run(tmp_path, EMA(decay=0.8), ptq, make=quiet_loaders, task=Normed(), epochs=2)
    assert ptq.scores[-1].metrics["val_loss"] == float(trainer.callback_metrics["val_loss"])


class LogsLate(Task):
    """Dynamo cannot trace ``self.log``."""

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.outputs.append(nn.functional.mse_loss(self(batch[0]), batch[1]))

    def on_validation_epoch_end(self):
        self.log("val_loss", torch.stack(self.outputs).mean())
        self.outputs.clear()


def test_a_compiled_module_is_scored_with_the_weights_of_its_copy(tmp_path):
    scores = []
    for compiled in (False, True):
        pl.seed_everything(3, verbose=False)
        task = LogsLate()
        ptq = PTQCallback("rtn", bits=(8, 2), results=tmp_path / f"{compiled}.jsonl")
        trainer = make_trainer(ptq, max_epochs=1)
        trainer.fit(torch.compile(task, backend="eager") if compiled else task, *quiet_loaders())
        scores.append([score.metrics["val_loss"] for score in ptq.scores])
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)
    assert scores[0][0] != scores[0][1]


def test_a_module_that_cannot_be_copied_is_refused_before_training(tmp_path):
    class Locked(Task):
        def __init__(self):
            super().__init__()
            self.lock = threading.Lock()

        def training_step(self, batch, batch_idx):
            pytest.fail("a batch was trained")

    with pytest.raises(QATConfigurationError, match=r"a copy of Locked, which cannot be copied: .*lock"):
        run(tmp_path, PTQCallback("rtn", bits=4), make=quiet_loaders, task=Locked())


def test_all_generators_of_a_dataset_are_put_back(tmp_path):
    class Augmented(torch.utils.data.Dataset):
        def __init__(self):
            self.transforms = [{"generator": random.Random(3)}, np.random.default_rng(4)]
            self.data = Quiet(48, 1)

        def __len__(self):
            return 48

        def __getitem__(self, index):
            x, y = self.data[index]
            return x + self.transforms[0]["generator"].random() + self.transforms[1].random(dtype=np.float32), y

    def make():
        shared = Augmented()
        return [DataLoader(torch.utils.data.Subset(shared, part), 8) for part in (range(40), range(40, 48))]

    without = run(tmp_path / "without", make=make)
    expected = everything(tmp_path / "without", *without)
    found = run(tmp_path / "with", PTQCallback(("rtn", "gptq"), bits=4), make=make)
    assert_same(everything(tmp_path / "with", *found), expected)


def test_random_states_are_put_back_after_an_exception():
    before = torch.get_rng_state(), random.getstate()
    with contextlib.suppress(KeyboardInterrupt), isolate_randomness([]):
        torch.randn(3), random.random()
        raise KeyboardInterrupt
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


@pytest.mark.filterwarnings("ignore:.*whose best value an annealed run has on a wide rung")
@pytest.mark.filterwarnings("ignore:.*which is not measured at every validation")
@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("schedule", [{0: 16, 6: 2}, [2]])
def test_a_monitored_metric_may_come_late(mode, schedule, tmp_path):
    qat, ptq = QATCallback("w2", schedule=schedule), PTQCallback("rtn", every_n_validations=2)
    key = "ptq_of_latent/current/rtn/val_loss"
    monitors = [pl_callbacks.ModelCheckpoint(tmp_path / "m", monitor=key, mode=mode)]
    monitors += [pl_callbacks.EarlyStopping(key, patience=9, mode=mode)]
    run(tmp_path, qat, ptq, *monitors, make=quiet_loaders, epochs=4)
    assert float(monitors[0].best_model_score) in [score.metrics["val_loss"] for score in ptq.scores]


@pytest.mark.parametrize(
    ("monitor", "with_qat", "message"),
    [
        (
            "ptq/gptq_w4/val_loss",
            False,
            "Without QATCallback its metrics begin with one of ptq/current/rtn/",
        ),
        ("ptq/rtn_w3/val_loss", False, "logs no such metric"),
        ("ptq/rtn_w4/val_loss", True, "logs no such metric.* ptq_of_latent/current/rtn/"),
        ("ptq/rtn_w4/loss", False, "validation logs only val_loss, val_metric"),
    ],
)
def test_monitoring_what_never_exists_is_refused(monitor, with_qat, message, tmp_path):
    qat = [QATCallback("w4")] if with_qat else []
    stopping = pl_callbacks.EarlyStopping(monitor)
    with pytest.raises(QATConfigurationError, match=message):
        run(tmp_path, *qat, PTQCallback("rtn", bits=4), stopping, make=quiet_loaders)


def test_current_is_the_width_that_qat_is_at(tmp_path):
    ptq = PTQCallback("rtn", bits=(8, 4, 2))
    _, trainer, _ = run(tmp_path, QATCallback("w2", schedule=[8, 4, 2]), ptq, make=quiet_loaders, epochs=3)
    with open(trainer.logger.experiment.metrics_file_path) as file:
        rows = [row for row in csv.DictReader(file) if row.get("ptq_of_latent/current/rtn/val_loss")]
    for row, width in zip(rows, (8, 4, 2), strict=True):
        assert row["ptq_of_latent/current/rtn/val_loss"] == row[f"ptq_of_latent/rtn_w{width}/val_loss"]


def test_a_scheduler_may_monitor_a_metric_that_comes_late(tmp_path):
    class Plateau(Task):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return [optimizer], [{"scheduler": scheduler, "monitor": "ptq/rtn_w4/val_loss"}]

    ptq = PTQCallback("rtn", bits=4, every_n_validations=2)
    run(tmp_path, ptq, make=quiet_loaders, task=Plateau, epochs=3)
    assert len(ptq.scores) == 1


def test_a_module_without_forward_needs_a_calibration_step(tmp_path):
    class NoForward(Task):
        forward = pl.LightningModule.forward

    with pytest.raises(QATConfigurationError, match=r"NoForward has no forward .* calibration_step\(self, batch\)"):
        run(tmp_path, PTQCallback("gptq", bits=4), make=quiet_loaders, task=NoForward, num_sanity_val_steps=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"calibration_data": iter([1])}, "must be a list of batches"),
        ({"memory_budget_gib": "4"}, "memory_budget_gib='4' must be a number"),
        ({"methods": ("rtn", 3)}, "a name or a mapping with a 'name', got 3"),
    ],
)
def test_wrong_types_are_refused_at_once(arguments, message):
    with pytest.raises(TypeError, match=message):
        PTQCallback(**arguments)


def test_bits_may_be_below_those_of_qat_but_not_below_a_scheme(tmp_path):
    ptq = PTQCallback("rtn", bits=(4, 2))
    rules = [{"target": "*", "scheme": "w4"}, {"target": "net.3", "scheme": "w8"}]
    run(tmp_path, QATCallback(rules), ptq, make=quiet_loaders, epochs=1)
    live, four, two = ptq.scores
    assert (live.num_bits, four.num_bits, two.num_bits) == (4, 4, 2)
    assert two.scheme == "w2, w8"
    assert two.metrics["val_loss"] != four.metrics["val_loss"]
    assert two.bits.quantized < four.bits.quantized
    with pytest.raises(QATConfigurationError, match="bits=2 is narrower than the scheme, 4 bits"):
        run(tmp_path / "other", PTQCallback("rtn", bits=(4, 2), scheme="w4"), make=quiet_loaders, epochs=1)


def test_scores_on_fewer_batches_are_those_of_fewer_batches(tmp_path):
    ptq = PTQCallback({"same": Identity()}, bits=4, limit_val_batches=1)
    task, _, _ = run(tmp_path, ptq, make=quiet_loaders, epochs=1)
    _, val = quiet_loaders()
    (expected,) = make_trainer(limit_val_batches=1).validate(task, val, verbose=False)
    assert ptq.scores[0].metrics == expected


def test_captured_batches_are_not_changed_by_the_model(tmp_path):
    class InPlace(Task):
        def forward(self, x):
            return self.net(x.mul_(0.5))

    ptq = PTQCallback("gptq", bits=4, calibration_samples=8)
    run(tmp_path, ptq, make=quiet_loaders, task=InPlace(), epochs=3)
    assert torch.equal(ptq._capture.batches[0][0], Quiet(48, 1).tensors[0][:8])


def count_tasks():
    gc.collect()
    return sum(type(thing) is Task for thing in gc.get_objects())  # isinstance is true of weak proxies, too


def test_nothing_is_left_behind_by_many_validations(tmp_path):
    ptq = PTQCallback(("rtn", "gptq"), bits=(4, 2), calibration_samples=8)
    before = count_tasks()
    task, trainer, _ = run(tmp_path, ptq, epochs=9, make=quiet_loaders, val_check_interval=1)
    assert len(ptq.scores) == 9 * 6 * 4
    assert not any(module._forward_pre_hooks for module in task.modules())
    assert not quantized_layers(task)
    assert trainer.strategy.lightning_module is task
    assert count_tasks() == before + 1


def test_an_error_in_the_pass_leaves_the_trainer_as_it_was(tmp_path):
    class Broken(Identity):
        def __call__(self, weight, schemes, observer, stats=None):
            raise RuntimeError("broken")

    pl.seed_everything(0, verbose=False)
    task, trainer = Task(), make_trainer(PTQCallback({"broken": Broken()}, bits=4), default_root_dir=tmp_path)
    with pytest.raises(RuntimeError, match="broken"):
        trainer.fit(task, *quiet_loaders())
    assert trainer.strategy.lightning_module is None or trainer.strategy.lightning_module is task
    assert trainer.callbacks


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"methods": "gtpq"}, "Did you mean 'gptq'"),
        ({"bits": 16}, "bits=16 must be one or more different widths"),
        ({"bits": ()}, "must be one or more different widths"),
        ({"bits": 4, "final_bits": (4, 4)}, "final_bits=.4, 4. must be one or more different widths"),
        ({"every_n_validations": 0}, "every_n_validations=0 must be a whole number"),
        ({"calibration_samples": 2.5}, "calibration_samples=2.5 must be a whole number"),
        ({"mode": "lower"}, "must be 'min' or 'max'"),
        ({"bits": True}, "must be one or more different widths"),
        ({"calibration_data": []}, "calibration_data has no batches"),
        ({"max_seconds": "5"}, "max_seconds='5' must be a finite number, 0 or more"),
        ({"validation_cache_gib": -1}, "validation_cache_gib=-1 must be a finite number"),
        ({"unseen": "skip"}, "must be 'error' or 'rtn'"),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        PTQCallback(**arguments)


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (lambda: PTQCallback("rtn"), "knows no width: give bits"),
        (lambda: PTQCallback("rtn", scheme="w4g3"), "does not divide"),
        (lambda: PTQCallback("rtn", bits=4, ignore="head"), "matches no module"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_training(callback, message, tmp_path):
    class NeverTrains(Task):
        def training_step(self, batch, batch_idx):
            pytest.fail("a batch was trained")

    with pytest.raises(QATConfigurationError, match=message):
        run(tmp_path, callback(), make=quiet_loaders, task=NeverTrains(), num_sanity_val_steps=0)


def test_under_ddp_training_is_undisturbed_and_all_ranks_agree(tmp_path):
    root = Path(__file__).parents[2]
    for kind in ("with", "without"):
        environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.callbacks.ddp_ptq", str(tmp_path), kind]
        done = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
    ended = {path.stem: torch.load(path, weights_only=True) for path in tmp_path.glob("*.pt")}
    assert sorted(ended) == ["with0", "with1", "without0", "without1"]
    scores = []
    for rank in (0, 1):
        with_ptq, without = ended[f"with{rank}"], ended[f"without{rank}"]
        names = [name for name in with_ptq["metrics"] if name.startswith("ptq")]
        assert len(names) == 3 * 3 * 3  # methods, two widths and the current one, metrics
        # Only the metric is synchronized over ranks.
        scores.append({name: with_ptq["metrics"][name] for name in names if name.endswith("val_metric")})
        for name in names:
            del with_ptq["metrics"][name]
        assert_same(with_ptq, without)
    assert scores[0] == scores[1]
    assert len(read_records(tmp_path / "results.jsonl")) == 2 * (1 + 3 * 2) * 3  # from one rank
