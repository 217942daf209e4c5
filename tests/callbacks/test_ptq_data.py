"""PTQCallback: what it loads, keeps, and takes up again after a stop."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import callbacks as pl_callbacks
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import BinaryAccuracy

from lightning_qat import PTQCallback, QATCallback
from lightning_qat.callbacks.batch_memory import BatchMemory
from lightning_qat.callbacks.errors import QATConfigurationError
from lightning_qat.callbacks.isolation import RandomStates
from lightning_qat.records import read_records
from tests.callbacks.test_ptq import Identity, Noisy, Quiet, Task, quiet_loaders, run
from tests.helpers import make_trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:Be aware that when using `ckpt_path`",
    "ignore:Checkpoint directory",
    "ignore:Trying to infer the `batch_size`",
)
TWO = {"first": Identity(), "second": Identity()}


class Counted(Dataset):
    """Counts what is read of it."""

    def __init__(self, dataset):
        self.dataset, self.num_reads = dataset, 0

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        self.num_reads += 1
        return self.dataset[index]


class Drawing(Task):
    """Draws random numbers in validation, how many depends on its weights; changes its batch, counts in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.count += 1
        torch.rand(int(1000 * self.net(batch[0]).abs().sum()) % 7 + 1)
        batch[0].add_(0.1 * torch.randn_like(batch[0]))
        super().validation_step(batch, batch_idx)
        self.log("count", self.count, reduce_fx="max", add_dataloader_idx=False)

    def on_validation_epoch_end(self):
        super().on_validation_epoch_end()
        self.log("last_draw", torch.rand(()))


def score(folder, **arguments):
    val = Counted(Quiet(21, 2))
    ptq = PTQCallback(("rtn", "gptq"), bits=(4, 2), calibration_samples=8, **arguments)
    make = lambda: (DataLoader(Quiet(48, 1), batch_size=8), DataLoader(val, batch_size=8))  # noqa: E731
    run(folder, ptq, make=make, task=Drawing, epochs=1, num_sanity_val_steps=0)
    return val.num_reads, [each.metrics for each in ptq.scores]


def test_batches_are_loaded_once_for_all_variants(tmp_path):
    reads, kept = score(tmp_path / "kept")
    assert reads == 2 * 21  # by validation itself, and for all variants
    reads, loaded = score(tmp_path / "loaded", validation_cache_gib=0)
    assert reads == 5 * 21
    reads, too_big = score(tmp_path / "too_big", validation_cache_gib=500 / 2**30)
    assert reads == 5 * 21
    assert kept == loaded == too_big
    assert len({metrics["last_draw"] for metrics in kept}) > 1
    assert {metrics["count"] for metrics in kept} == {6.0}  # three batches of the validation before, three of its own


class Worded(Dataset):
    """Samples with words, which stay with their batch."""

    def __init__(self):
        self.quiet = Quiet(21, 2)

    def __len__(self):
        return 21

    def __getitem__(self, index):
        x, y = self.quiet[index]
        return {"x": x, "y": y, "word": f"word {index}"}


class Wordy(Task):
    def validation_step(self, batch, batch_idx):
        assert all(word.startswith("word ") for word in batch.pop("word"))
        super().validation_step((batch["x"], batch["y"]), batch_idx)


class NeverEnding(torch.utils.data.IterableDataset):
    """Has no length."""

    def __iter__(self):
        generator = torch.Generator().manual_seed(1)
        for _ in range(20):
            yield torch.randn(8, generator=generator) + 0.01 * torch.randn(8), torch.randn(4, generator=generator)


LOADERS = {
    "noise": lambda: DataLoader(Noisy(21, 2), batch_size=8),
    "words": lambda: DataLoader(Worded(), batch_size=8),
    "no length": lambda: DataLoader(NeverEnding(), batch_size=8),
    "workers": lambda: DataLoader(Quiet(21, 2), batch_size=8, num_workers=1, persistent_workers=True),
    "shuffled": lambda: DataLoader(Quiet(21, 2), batch_size=8, shuffle=True),
    "two": lambda: [DataLoader(Noisy(21, 2), batch_size=8), DataLoader(Noisy(9, 3), batch_size=4)],
    "combined": lambda: pl.utilities.CombinedLoader(
        [DataLoader(Noisy(21, 2), batch_size=8), DataLoader(Quiet(13, 3), batch_size=4)], "max_size_cycle"
    ),
}


class Combined(Task):
    def validation_step(self, batch, batch_idx):
        for part in batch:
            super().validation_step(part, batch_idx)


@pytest.mark.filterwarnings("ignore:Your `val_dataloader`'s sampler has shuffling")
@pytest.mark.parametrize("limit", [None, 2])
@pytest.mark.parametrize("name", LOADERS)
def test_what_is_kept_is_what_would_be_loaded(name, limit, tmp_path):
    task = {"words": Wordy, "combined": Combined}.get(name, Task)
    scores = {}
    for size in (1, 0):
        ptq = PTQCallback(TWO, bits=4, validation_cache_gib=size, limit_val_batches=limit, calibration_samples=8)
        make = lambda: (DataLoader(Quiet(48, 1), batch_size=8), LOADERS[name]())  # noqa: E731
        monitor = "val_loss/dataloader_idx_0" if name == "two" else "val_loss"
        run(tmp_path / str(size), ptq, make=make, task=task, epochs=1, monitor=monitor)
        scores[size] = [each.metrics for each in ptq.scores]
    assert scores[0] == scores[1]
    assert scores[0][0] == scores[0][1]


def test_what_cannot_be_copied_is_not_kept():
    memory = BatchMemory(2**20)
    now = RandomStates.now()
    memory.begin(now, 2)
    memory.add((torch.ones(3), 0, 0), now)
    assert not memory.has_overflowed
    memory.add((lambda: 0, 1, 0), now)
    assert memory.has_overflowed


def test_a_tensor_that_occurs_twice_in_a_batch_is_still_one():
    memory, x, now = BatchMemory(2**20), torch.ones(3, requires_grad=True), RandomStates.now()
    memory.begin(now, None)
    memory.add(({"x": x, "same": x, "other": torch.ones(3)}, 0, 0), now)
    ((batch, _, _),) = memory.replay()
    assert batch["x"] is batch["same"] is not x
    assert batch["other"] is not batch["x"]
    assert batch["x"].requires_grad


def test_a_view_of_a_large_tensor_counts_as_what_it_shows():
    memory, large, now = BatchMemory(10_000), torch.zeros(2**20), RandomStates.now()
    memory.begin(now, None)
    for index in range(4):
        memory.add((large[10 * index : 10 * index + 10], index, 0), now)
    assert not memory.has_overflowed
    assert all(item[0].untyped_storage().nbytes() == 40 for item, *_ in [(item,) for item in memory.replay()])


def test_the_live_model_is_scored_on_as_many_batches_as_the_variants(tmp_path):
    ptq = PTQCallback("rtn", limit_val_batches=1)
    task, _, _ = run(tmp_path, QATCallback("w2"), ptq, make=quiet_loaders, epochs=1)
    (expected,) = make_trainer(limit_val_batches=1).validate(task, quiet_loaders()[1], verbose=False)
    assert ptq.scores[0].method == "qat"
    assert ptq.scores[0].metrics == expected


def test_a_metric_may_say_which_direction_is_better(tmp_path):
    class Classifier(Task):
        def __init__(self):
            super().__init__()
            self.accuracy = BinaryAccuracy()

        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.accuracy(self(batch[0]), (batch[1] > 0).int())
            self.log("accuracy", self.accuracy)

    def directions(**arguments):
        ptq = PTQCallback("rtn", bits=4, results=tmp_path / f"{len(arguments)}.jsonl", **arguments)
        run(tmp_path, ptq, make=quiet_loaders, task=Classifier(), epochs=1)
        return {record.metric: record.higher_is_better for record in read_records(ptq.results)}

    expected = {"val_loss": False, "val_metric": False, "val_spread": False, "accuracy": True}
    assert directions() == expected
    assert directions(mode={"val_spread": "max", "accuracy": "min"}) == {
        **expected,
        "val_spread": True,
        "accuracy": False,
    }


def test_a_mode_holds_for_a_metric_on_all_loaders(tmp_path):
    class Classifier(Task):
        def __init__(self):
            super().__init__()
            self.accuracy = BinaryAccuracy()

        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            super().validation_step(batch, batch_idx)
            self.accuracy(self(batch[0]), (batch[1] > 0).int())
            self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)

    def make():
        train, val = quiet_loaders()
        return train, [val, val]

    ptq = PTQCallback("rtn", bits=4, mode={"val_spread": "max", "val_loss": "min", "precision": "max"})
    with pytest.warns(UserWarning, match="mode names precision, but validation logs val_loss/dataloader_idx_0"):
        run(tmp_path, ptq, make=make, task=Classifier(), epochs=1, monitor="val_loss/dataloader_idx_0")
    records = read_records(tmp_path / "ptq_results.jsonl")
    assert {record.metric for record in records if record.higher_is_better} == {
        "accuracy/dataloader_idx_0",
        "accuracy/dataloader_idx_1",
        "accuracy_epoch/dataloader_idx_0",
        "accuracy_epoch/dataloader_idx_1",
        "val_spread",
    }


@pytest.mark.parametrize(
    ("scheme", "arguments", "message"),
    [
        ("w4g8", {}, r"has no result of w4g8 at step 6 .* It has w2, w4 at steps 6"),
        ("w3", {}, "has no result of w3 at step 6"),
        ("w4a8", {}, "has no result of w4a8 at step 6"),
        ("w4", {"limit_val_batches": 1}, "with limit_val_batches=1, so no gap .* with limit_val_batches=None"),
    ],
)
def test_what_cannot_be_compared_is_said(scheme, arguments, message, tmp_path):
    run(tmp_path / "float", PTQCallback("rtn", bits=(4, 2)), make=quiet_loaders, epochs=1)
    ptq = PTQCallback("rtn", baseline=tmp_path / "float" / "ptq_results.jsonl", **arguments)
    with pytest.warns(UserWarning, match=message):
        _, trainer, _ = run(tmp_path / "qat", QATCallback(scheme), ptq, make=quiet_loaders, epochs=1)
    assert not [name for name in trainer.callback_metrics if name.startswith("gap")]


def test_a_baseline_is_of_one_run_and_exists(tmp_path):
    path = tmp_path / "results.jsonl"
    for seed in (1, 2):
        task = Task()
        torch.manual_seed(seed)
        nn.init.normal_(task.net[0].weight)
        run(tmp_path, PTQCallback("rtn", bits=4, results=path), make=quiet_loaders, task=task, epochs=1)
    with pytest.raises(ValueError, match="several runs wrote to it"):
        PTQCallback("rtn", baseline=path)
    with pytest.raises(FileNotFoundError, match=r"baseline=.*: there is no such file"):
        PTQCallback("rtn", baseline=tmp_path / "other.jsonl")
    (tmp_path / "one.jsonl").write_text(path.read_text().splitlines()[-1] + "\n")
    with pytest.warns(UserWarning, match="baseline has no effect without QATCallback"):
        run(tmp_path, PTQCallback("rtn", bits=4, baseline=tmp_path / "one.jsonl"), make=quiet_loaders, epochs=1)


def test_callbacks_that_count_validations_are_warned_or_refused(tmp_path):
    key = "ptq/current/rtn/val_loss"
    ptq, stopping = PTQCallback("rtn", bits=4, every_n_validations=3), pl_callbacks.EarlyStopping(key, patience=2)
    with pytest.raises(QATConfigurationError, match="give it a patience of at least 3"):
        run(tmp_path, ptq, stopping, make=quiet_loaders, num_sanity_val_steps=0)
    with pytest.warns(UserWarning, match="ModelCheckpoint monitors .* is not measured at every validation"):
        run(tmp_path, PTQCallback("rtn", bits=4, max_seconds=60), make=quiet_loaders, monitor=key, epochs=1)


def test_metrics_are_logged_in_the_row_of_the_validation(tmp_path):
    run(tmp_path, PTQCallback("rtn", bits=4), make=quiet_loaders, epochs=2)
    (path,) = tmp_path.rglob("metrics.csv")
    with open(path) as file:
        rows = list(csv.DictReader(file))
    steps = [{(row["step"], row["epoch"]) for row in rows if row[name]} for name in ("val_loss", "ptq/rtn_w4/val_loss")]
    assert steps[0] == steps[1]
    assert len(steps[0]) == 2


class NoKeys(Task):
    def forward(self, image):
        return self.net(image)

    def training_step(self, batch, batch_idx):
        pytest.fail("a batch was trained")


class TwoArguments(NoKeys):
    def forward(self, image, scale, mask):
        return self.net(image) * scale


class WrongStep(NoKeys):
    def calibration_step(self, batch, batch_idx):
        return self.net(batch[0])


class Named(Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        return {"x": torch.ones(8), "y": torch.zeros(4)}


@pytest.mark.parametrize(
    ("task", "data", "message"),
    [
        (NoKeys, Named(), "forward fails on a calibration batch with TypeError.*calibration_step"),
        (TwoArguments, Quiet(16, 1), "forward fails on a calibration batch with .*'mask'"),
        (WrongStep, Quiet(16, 1), r"calibration_step\(batch\) fails .*'batch_idx'"),
    ],
)
def test_a_module_that_cannot_be_calibrated_is_refused_before_it_is_trained(task, data, message, tmp_path):
    trainer = make_trainer(PTQCallback("gptq", bits=4), default_root_dir=tmp_path)
    with pytest.raises(QATConfigurationError, match=message):
        trainer.fit(task(), DataLoader(data, batch_size=8), quiet_loaders()[1])


def test_a_validation_of_a_checkpoint_takes_its_batches_and_does_not_count_as_resumed(tmp_path):
    run(tmp_path, PTQCallback("gptq", bits=4, calibration_samples=8), make=quiet_loaders, epochs=2)
    ptq = PTQCallback("gptq", bits=4, calibration_samples=8)
    trainer = make_trainer(ptq, default_root_dir=tmp_path)
    trainer.validate(Task(), quiet_loaders()[1], ckpt_path=tmp_path / "ckpt" / "last.ckpt", verbose=False)
    assert len(ptq.scores) == 1
    loader = DataLoader(Quiet(48, 9), batch_size=8)
    make_trainer(ptq, default_root_dir=tmp_path).fit(Task(), loader, quiet_loaders()[1])
    assert torch.equal(ptq._capture.batches[0][0], next(iter(loader))[0])
    assert ptq._num_validations == 1


def test_what_qat_decides_is_not_silently_ignored(tmp_path):
    with pytest.warns(UserWarning, match="scheme, ignore have no effect beside QATCallback"):
        run(tmp_path, QATCallback("w4"), PTQCallback("rtn", scheme="w4g8", ignore="net.0"), epochs=1)


def test_only_one_is_accepted():
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `PTQCallback`"):
        make_trainer(PTQCallback(bits=4), PTQCallback(bits=2))


def test_a_standalone_validation_is_always_due(tmp_path):
    batches = [batch for batch, _ in zip(quiet_loaders()[0], range(2), strict=False)]
    ptq = PTQCallback("gptq", bits=4, every_n_validations=3, calibration_data=batches)
    trainer = make_trainer(ptq, default_root_dir=tmp_path)
    trainer.validate(Task(), quiet_loaders()[1], verbose=False)
    assert len(ptq.scores) == 1


# ------------------------------------------------------------------------------------------------ after a stop


class Deadly(Identity):
    """Ends the process, without a chance to clean up, when it is called for the n-th time."""

    def __init__(self, calls):
        self.calls = calls

    def __call__(self, weight, schemes, observer, stats=None):
        self.calls -= 1
        if self.calls == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(weight, schemes, observer, stats)


class Ordered(Dataset):
    """Batches by their position: a stateful loader would give the same."""

    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        self.x, self.y = torch.randn(48, 8, generator=generator), torch.randn(48, 4, generator=generator)

    def __len__(self):
        return 48

    def __getitem__(self, index):
        return self.x[index], self.y[index]


def train(folder, calls=0, ckpt_path=None):
    """Train four epochs with a validation and a checkpoint after each; return all that should not depend on stops."""
    pl.seed_everything(3, verbose=False)
    task, folder = Task(), Path(folder)
    task.net[2] = nn.Identity()  # dropout: a resumed run draws other numbers, with and without PTQCallback
    ptq = PTQCallback({"deadly": Deadly(calls), "gptq": {"name": "gptq"}}, bits=(4, 2), calibration_samples=16)
    checkpoint = pl_callbacks.ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_last=True)
    trainer = make_trainer(
        ptq, checkpoint, max_epochs=4, enable_checkpointing=True, default_root_dir=folder, max_steps=-1
    )
    trainer.fit(task, DataLoader(Ordered(), batch_size=8), DataLoader(Quiet(21, 2), batch_size=8), ckpt_path=ckpt_path)
    records = [(r.method, r.num_bits, r.metric, r.step, r.value) for r in read_records(folder / "ptq_results.jsonl")]
    saved = torch.load(folder / "last.ckpt", weights_only=True)
    del saved["callbacks"]
    return saved, records


def test_killed_within_a_pass_training_resumes_as_if_it_had_not_run(tmp_path):
    root = Path(__file__).parents[2]
    script = f"from tests.callbacks.test_ptq_data import train; train({str(tmp_path / 'killed')!r}, calls=5)"
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", script], cwd=root, env=environment, check=False, timeout=300)
    assert done.returncode == -signal.SIGKILL
    lines = (tmp_path / "killed" / "ptq_results.jsonl").read_text().splitlines()
    assert {json.loads(line)["step"] for line in lines} == {6, 12}  # in the third of four passes
    expected, records = train(tmp_path / "whole")
    found, resumed_records = train(tmp_path / "killed", ckpt_path=tmp_path / "killed" / "last.ckpt")
    text = repr(found["loops"]) + repr(found["lr_schedulers"])
    assert text == repr(expected["loops"]) + repr(expected["lr_schedulers"])
    for name, value in expected["state_dict"].items():
        assert torch.equal(found["state_dict"][name], value)
    for index, state in expected["optimizer_states"][0]["state"].items():
        for name, value in state.items():
            assert torch.equal(found["optimizer_states"][0]["state"][index][name], value)
    assert resumed_records == records


def test_a_resumed_run_calibrates_on_the_same_batches(tmp_path):
    run(tmp_path, first := PTQCallback("gptq", bits=4, calibration_samples=20, every_n_validations=2), epochs=3)
    second = PTQCallback("gptq", bits=4, calibration_samples=20, every_n_validations=2)
    trainer = make_trainer(second, max_epochs=4, default_root_dir=tmp_path)
    trainer.fit(Task(), *quiet_loaders(), ckpt_path=tmp_path / "ckpt" / "last.ckpt")
    assert len(second._capture.batches) == 3
    for ours, theirs in zip(second._capture.batches, first._capture.batches, strict=True):
        assert torch.equal(ours[0], theirs[0])
    assert len(first.scores) == 1  # at the second of three validations
    assert len(second.scores) == 1  # at the fourth


def test_batches_that_a_checkpoint_cannot_hold_are_said_to_be_others(tmp_path):
    class Samples(list):
        """Not a plain list."""

    def collate(samples):
        return Samples(torch.utils.data.default_collate(samples))

    def make():
        return DataLoader(Quiet(48, 1), batch_size=8, collate_fn=collate), DataLoader(Quiet(21, 2), batch_size=8)

    run(tmp_path, PTQCallback("gptq", bits=4), make=make, epochs=1)
    trainer = make_trainer(PTQCallback("gptq", bits=4), max_epochs=2, default_root_dir=tmp_path)
    with pytest.warns(UserWarning, match="does not hold the batches that PTQCallback calibrated on"):
        trainer.fit(Task(), *make(), ckpt_path=tmp_path / "ckpt" / "last.ckpt")


def test_a_new_fit_starts_anew(tmp_path):
    ptq = PTQCallback("gptq", bits=4, calibration_samples=8, every_n_validations=2)
    for seed in (1, 5):
        trainer = make_trainer(ptq, max_epochs=3, default_root_dir=tmp_path)
        loader = DataLoader(Quiet(48, seed), batch_size=8)
        trainer.fit(Task(), loader, quiet_loaders()[1])
        assert torch.equal(ptq._capture.batches[0][0], next(iter(loader))[0])
        assert ptq._num_validations == 3
    assert isinstance(ptq.state_dict()["capture"]["batches"], list)
    assert not isinstance(ptq.state_dict()["capture"], nn.Module)
