"""Distillation in real Trainer runs."""

import copy
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import callbacks as pl_callbacks
from torch import nn
from torch.utils.data import DataLoader

from lightning_qat import QATCallback, restore_float
from lightning_qat.callbacks.errors import QATConfigurationError
from lightning_qat.callbacks.step_checkpoint import StepCheckpoint
from lightning_qat.callbacks.techniques import Distillation
from lightning_qat.nn import prepare
from lightning_qat.nn.distillation import kl_divergence, relative_error
from lightning_qat.nn.float_model import weights_of
from lightning_qat.nn.teacher import CopyTeacher, OwnWeights
from tests.callbacks.test_checkpoints import assert_same, state_of
from tests.helpers import batch_at, loader, make_trainer

STEPS = 8


class Distilled(Distillation):
    """Keeps what its teacher was at the end of training."""

    def on_train_end(self, trainer, pl_module):
        self.teacher_weights = {name: weight.clone() for name, weight in weights_of(self._teacher.module).items()}


class Classifier(pl.LightningModule):
    """Classes of noise, with dropout; batches depend on nothing but the step. Records the loss that was minimised."""

    def __init__(self, seed=0, ranks=1, calls_forward=False, lr=1e-2, make_optimizer=torch.optim.AdamW):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 8))
        self.ranks, self.calls_forward, self.lr, self.make_optimizer = ranks, calls_forward, lr, make_optimizer
        self.losses = []

    def forward(self, x):
        return self.net(x)

    def batch(self, index):
        x = batch_at(index)
        return x.chunk(self.ranks)[self.global_rank % self.ranks]

    def step(self, x):
        logits = self(x) if self.calls_forward else self.net(x)
        return F.cross_entropy(logits, x[:, :8].argmax(1))

    def training_step(self, batch, batch_idx):
        index = self.trainer.fit_loop.total_batch_idx
        torch.manual_seed(index)  # of the dropout, as a run that resumes has it
        return self.step(self.batch(index))

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.losses.append(None if outputs is None else outputs["loss"].item())

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters(), self.lr)


def classify(num_batches=100):
    return loader(num_batches)


def train(task, *callbacks, ckpt_path=None, max_steps=STEPS, num_batches=100, **kwargs):
    trainer = make_trainer(*callbacks, max_steps=max_steps, **kwargs)
    trainer.fit(task, classify(num_batches), ckpt_path=ckpt_path)
    return trainer


def distilled(**arguments):
    return QATCallback("w2", distillation=arguments or True)


def technique(callback):
    return next(each for each in callback.techniques if isinstance(each, Distillation))


# ---------------------------------------------------------------------------------------------------- what it trains


@pytest.mark.parametrize("calls_forward", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_equals_a_loop_written_by_hand_to_the_bit(calls_forward, accumulate):
    task = Classifier(calls_forward=calls_forward)
    train(task, distilled(temperature=2.0, weight=3.0, task_weight=0.25), accumulate_grad_batches=accumulate)
    by_hand, teacher = Classifier(), Classifier().eval()
    prepare(by_hand, "w2")
    optimizer = torch.optim.AdamW(by_hand.parameters(), 1e-2)
    losses = []
    for index in range(STEPS * accumulate):
        x = batch_at(index)
        torch.manual_seed(index)
        logits = by_hand.net(x)
        with torch.no_grad():
            target = teacher.net(x)
        loss = 0.25 * F.cross_entropy(logits, x[:, :8].argmax(1)) + 3.0 * kl_divergence(logits, target, 2.0)
        (loss / accumulate).backward()
        losses.append((loss / accumulate).item())
        if (index + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    assert task.losses == losses
    assert_same(state_of(task), state_of(by_hand))


def test_the_student_comes_closer_to_the_float_model_than_by_its_labels():
    x = torch.cat([batch_at(1000 + index) for index in range(20)])
    target = Classifier().net.eval()(x)
    distances = {}
    for name, arguments in (("labels", None), ("distilled", True), ("both", {"task_weight": 1.0})):
        task = Classifier()
        train(task, QATCallback("w2", distillation=arguments), max_steps=60)
        distances[name] = kl_divergence(task.net.eval()(x), target).item()
    assert distances["distilled"] < distances["both"] < distances["labels"]


def test_layer_outputs_are_distilled():
    task = Classifier(lr=0.0)
    arguments = {"weight": 0.0, "hidden": ["ReLU", "net.3"], "hidden_weight": 2.0}
    train(task, distilled(**arguments), max_steps=1)
    student, teacher = Classifier(), Classifier().eval()
    prepare(student, "w2")
    x = batch_at(0)
    torch.manual_seed(0)
    pairs = []
    for net in (student.net, teacher.net):
        hidden = net[1](net[0](x))
        pairs.append((hidden, net[3](net[2](hidden))))
    assert task.losses == [(2.0 * torch.stack(list(map(relative_error, *pairs))).mean()).item()]


def test_outputs_that_are_no_logits_are_distilled_by_their_error():
    task = Classifier(lr=0.0)
    train(task, distilled(loss="mse"), max_steps=1)
    student = Classifier()
    prepare(student, "w2")
    torch.manual_seed(0)
    assert task.losses == [relative_error(student(batch_at(0)), Classifier().eval()(batch_at(0))).item()]


class Siamese(Classifier):
    """One encoder for two inputs, without a forward that gives both."""

    def __init__(self):
        super().__init__()
        self.encoder, self.head = self.net, nn.Linear(8, 2)
        del self.net

    def step(self, x):
        with torch.no_grad():
            self.encoder(x)  # does not count
        first, second = self.encoder(x), self.encoder(x + 1)
        return self.head(first * second).square().mean()


def test_every_call_of_an_encoder_is_distilled():
    task = Siamese()
    task.encoder[2].p = 0.0
    reference = copy.deepcopy(task)
    train(task, distilled(module="encoder", task_weight=0.5), max_steps=1)
    teacher = copy.deepcopy(reference.encoder)
    prepare(reference, "w2")
    x = batch_at(0)
    calls = [kl_divergence(reference.encoder(each), teacher(each)) for each in (x, x + 1)]
    assert task.losses == [(0.5 * reference.step(x) + torch.stack(calls).mean()).item()]


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_other_results_of_a_step_stay_and_skipped_batches_pass():
    class Mixed(Classifier):
        def training_step(self, batch, batch_idx):
            if batch_idx == 1:
                return None
            return {"loss": super().training_step(batch, batch_idx), "extra": batch_idx}

        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.losses.append((outputs or {}).get("extra"))

    task, plain = Mixed(), Classifier()
    train(task, distilled(), max_epochs=1, max_steps=-1, num_batches=3)
    assert task.losses == [0, None, 2]
    assert not torch.equal(task.net[0].weight, plain.net[0].weight)


def test_an_optimizer_that_evaluates_the_loss_several_times_gets_the_same_loss_each_time():
    def make(parameters, lr):
        return torch.optim.LBFGS(parameters, lr, max_iter=4)

    task = Classifier(make_optimizer=make)
    train(task, distilled(), max_steps=2)
    by_hand, teacher = Classifier(), Classifier().eval()
    prepare(by_hand, "w2")
    optimizer = make(by_hand.parameters(), 1e-2)
    for index in range(2):

        def closure(index=index):
            x = batch_at(index)
            optimizer.zero_grad()
            torch.manual_seed(index)
            logits = by_hand.net(x)
            loss = 0.0 * F.cross_entropy(logits, x[:, :8].argmax(1)) + kl_divergence(logits, teacher.net(x).detach())
            loss.backward()
            return loss

        optimizer.step(closure)
    assert_same(state_of(task), state_of(by_hand))


# ------------------------------------------------------------------------------------------------------ transformers


class LlamaTask(pl.LightningModule):
    def __init__(self, lr=1e-3):
        super().__init__()
        transformers = pytest.importorskip("transformers")
        config = transformers.LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=32,
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = transformers.LlamaForCausalLM(config)
        self.lr, self.losses = lr, []

    def training_step(self, batch, batch_idx):
        self.batch = batch
        return self.model(**batch).loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], self.lr)


def token_batches(num_batches=4):
    generator = torch.Generator().manual_seed(0)
    for _ in range(num_batches):
        ids = torch.randint(0, 50, (4, 10), generator=generator)
        mask = (torch.arange(10) < torch.tensor([[10], [7], [4], [1]])).long()
        yield {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def feed(batches):
    return DataLoader(list(batches), batch_size=None)


def test_a_language_model_learns_from_its_float_self_without_padding():
    task = LlamaTask(lr=0.0)
    batches = list(token_batches(2))
    callback = distilled(hidden="LlamaDecoderLayer", hidden_weight=0.5)
    make_trainer(callback, max_steps=2).fit(task, feed(batches))
    assert technique(callback)._teacher.module.lm_head.weight is not task.model.lm_head.weight
    float_model = LlamaTask().model.eval()
    for batch, loss in zip(batches, task.losses, strict=True):
        mask = batch["attention_mask"].bool()
        student, teacher = (
            model(batch["input_ids"], attention_mask=mask.long()) for model in (task.model, float_model)
        )
        ours, theirs = (model.logits[mask].log_softmax(-1) for model in (student, teacher))
        kl = (theirs.exp() * (theirs - ours)).sum(-1).mean()
        ours, theirs = captured(task.model, batch), captured(float_model, batch)
        errors = [((a - b)[mask] ** 2).sum() / (b[mask] ** 2).sum() for a, b in zip(ours, theirs, strict=True)]
        assert len(errors) == 2
        assert loss == pytest.approx((kl + 0.5 * sum(errors) / 2).item(), rel=1e-4)


def captured(model, batch):
    found = []
    handles = [
        layer.register_forward_hook(lambda module, args, output: found.append(output)) for layer in model.model.layers
    ]
    model(batch["input_ids"], attention_mask=batch["attention_mask"])
    for handle in handles:
        handle.remove()
    return [output[0] if isinstance(output, tuple) else output for output in found]


def test_gradient_checkpointing_changes_nothing():
    states = []
    for saves in (False, True):
        task = LlamaTask()
        if saves:
            task.model.gradient_checkpointing_enable({"use_reentrant": False})
            task.model.config.use_cache = False
        make_trainer(distilled(hidden="mlp"), max_steps=3).fit(task, feed(token_batches(3)))
        states.append((task.losses, state_of(task)))
    assert states[0][0] == states[1][0]
    assert_same(states[0][1], states[1][1])


def scales_only(**arguments):
    task = LlamaTask(lr=1e-2)
    task.requires_grad_(False)
    callback = QATCallback("w2", scale_lr=1e-2, distillation=arguments or True)
    return task, callback


def test_frozen_weights_are_the_teacher_and_teach_as_a_copy_does_to_the_bit(capsys):
    results = []
    for arguments, kind, told in (
        ({}, OwnWeights, "its own frozen weights without the quantizers"),
        ({"teacher": "copy"}, CopyTeacher, "a copy of its weights (float32, 0.0 MiB)"),
    ):
        task, callback = scales_only(**arguments)
        trainer = make_trainer(callback, max_steps=4)
        trainer.fit(task, feed(token_batches()))
        assert isinstance(technique(callback)._teacher, kind)
        assert told.split("(")[0] in " ".join(capsys.readouterr().out.replace("│", " ").split())
        results.append((task.losses, state_of(task)))
    assert results[0][0] == results[1][0]
    assert_same(results[0][1], results[1][1])
    assert any("log_scale_ratio" in name and value.any() for name, value in results[0][1].items())


def test_adapters_that_train_need_a_copy():
    task = LlamaTask()
    task.requires_grad_(False)
    task.model.model.norm.weight.requires_grad_(True)
    callback = QATCallback("w2", scale_lr=1e-2, distillation=True)
    make_trainer(callback, max_steps=1).fit(task, feed(token_batches(1)))
    assert isinstance(technique(callback)._teacher, CopyTeacher)


def test_frozen_weights_that_begin_to_train_are_noticed():
    class Unfreeze(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            pl_module.model.model.norm.weight.requires_grad_(batch_idx == 2)

    task, callback = scales_only()
    with pytest.raises(QATConfigurationError, match=r"train now or were changed.*teacher='copy'"):
        make_trainer(callback, Unfreeze(), max_steps=4).fit(task, feed(token_batches()))
    assert "training_step" not in vars(task)


class Counting(Classifier):
    """Counts its calls, and trains nothing but scales."""

    class Net(nn.Sequential):
        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    def __init__(self, seed=0):
        super().__init__(seed)
        self.net = self.Net(*self.net).requires_grad_(False)
        self.net.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def configure_optimizers(self):
        return torch.optim.AdamW([parameter for parameter in self.parameters() if parameter.requires_grad], self.lr)


@pytest.mark.parametrize("save_teacher", [False, True])
def test_a_frozen_model_that_counts_its_calls_is_distilled_and_resumed(save_teacher, tmp_path):
    whole, resumed = Counting(), Counting(seed=9 if save_teacher else 0)
    for task, callbacks, start in ((whole, [StepCheckpoint(tmp_path, [3])], None), (resumed, [], "step3.ckpt")):
        callback = QATCallback("w2", scale_lr=1e-2, distillation={"save_teacher": save_teacher})
        train(task, callback, *callbacks, ckpt_path=start and tmp_path / start)
    assert whole.net.calls == STEPS
    assert resumed.losses == whole.losses[3:]


def test_resuming_with_frozen_weights_as_the_teacher_is_bit_exact(tmp_path):
    task, callback = scales_only()
    make_trainer(callback, StepCheckpoint(tmp_path, [2]), max_steps=4).fit(task, feed(token_batches()))
    resumed, callback = scales_only()
    with torch.no_grad():
        resumed.model.model.layers[0].mlp.up_proj.weight.zero_()  # the checkpoint has it
    batches = list(token_batches())[2:]
    trainer = make_trainer(callback, max_steps=4, max_epochs=-1)
    trainer.fit(resumed, feed(batches), ckpt_path=tmp_path / "step2.ckpt")
    assert resumed.losses == task.losses[2:]
    assert_same(state_of(task), state_of(resumed))


# ------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("arguments", [{}, {"save_teacher": True}, {"hidden": "ReLU", "task_weight": 1.0}])
@pytest.mark.parametrize("at", [1, 5])
def test_resuming_is_bit_exact(arguments, at, tmp_path):
    options = {"accumulate_grad_batches": 2, "log_every_n_steps": 3}
    whole = Classifier()
    callback = distilled(**arguments)
    train(whole, callback, StepCheckpoint(tmp_path, [at]), **options)
    resumed = Classifier(seed=99 if "save_teacher" in arguments else 0)
    again = distilled(**arguments)
    train(resumed, again, ckpt_path=tmp_path / f"step{at}.ckpt", **options)
    assert resumed.losses == whole.losses[2 * at :]
    assert_same(state_of(whole), state_of(resumed))
    assert_same(weights_of(technique(callback)._teacher.module), weights_of(technique(again)._teacher.module))
    assert technique(callback).figures() == technique(again).figures()


def test_the_teacher_is_no_part_of_model_optimizer_or_checkpoint(tmp_path):
    task = Classifier()
    names = set(task.state_dict())
    trainer = train(task, distilled(), StepCheckpoint(tmp_path, [3]))
    content = torch.load(tmp_path / "step3.ckpt", weights_only=True)
    assert set(content["state_dict"]) == names
    assert sum(len(group["params"]) for group in trainer.optimizers[0].param_groups) == 4
    assert content["lightning_qat"]["techniques"]["distillation"]["weights"] is None
    Classifier(seed=9).load_state_dict(content["state_dict"], strict=True)
    restore_float(task)
    assert set(task.state_dict()) == names


def test_a_teacher_other_than_that_of_the_run_is_refused(tmp_path):
    other = Classifier(seed=5).net
    train(Classifier(), distilled(), StepCheckpoint(tmp_path, [3]))
    path = tmp_path / "step3.ckpt"
    message = r"teacher is not the one of the run that is resumed.*same pretrained.*teacher=.*save_teacher=True"
    for task, arguments in (
        (Classifier(seed=1), {}),
        (Classifier(), {"teacher": other}),
        (Classifier(), {"teacher_dtype": "bfloat16"}),
    ):
        with pytest.raises(QATConfigurationError, match=message):
            train(task, distilled(**arguments), ckpt_path=path)
        assert task.losses == []
    resumed = Classifier(seed=1)
    train(resumed, distilled(teacher=Classifier().net), ckpt_path=path)
    assert len(resumed.losses) == STEPS - 3


def test_a_run_without_distillation_is_resumed_with_it_by_a_given_teacher_alone(tmp_path):
    train(Classifier(), QATCallback("w2"), StepCheckpoint(tmp_path, [3]))
    with pytest.raises(QATConfigurationError, match="that run had no distillation"):
        train(Classifier(), distilled(), ckpt_path=tmp_path / "step3.ckpt")
    task = Classifier()
    train(task, distilled(teacher=Classifier().net), ckpt_path=tmp_path / "step3.ckpt")
    assert len(task.losses) == STEPS - 3


def test_the_float_model_of_a_float_checkpoint_is_the_teacher(tmp_path):
    float_task = Classifier()
    train(float_task, StepCheckpoint(tmp_path, [3]), max_steps=3)
    callback = distilled()
    train(Classifier(seed=9), callback, ckpt_path=tmp_path / "step3.ckpt")
    assert_same(weights_of(technique(callback)._teacher.module), dict(float_task.net.named_parameters()))


# ------------------------------------------------------------------------------------------------------ other teachers


def test_a_given_teacher_is_called_with_the_same_inputs_in_evaluation_mode():
    teacher = Classifier(seed=3)
    expected, task = copy.deepcopy(teacher).eval(), Classifier(lr=0.0)
    train(task, distilled(teacher=teacher), max_steps=1)
    student = Classifier()
    prepare(student, "w2")
    torch.manual_seed(0)
    assert task.losses == [kl_divergence(student.net(batch_at(0)), expected(batch_at(0))).item()]
    assert teacher.training


def test_cached_logits_are_the_teacher():
    class Cached(Classifier):
        def training_step(self, batch, batch_idx):
            torch.manual_seed(batch_idx)
            return self.step(batch["x"])

    batches = [
        {"x": batch_at(index), "teacher_logits": Classifier().net.eval()(batch_at(index)).detach()}
        for index in range(4)
    ]
    cached, copied = Cached(), Cached()
    for task, arguments in ((cached, {"teacher": lambda batch: batch["teacher_logits"]}), (copied, {})):
        make_trainer(distilled(**arguments), max_steps=4).fit(task, feed(batches))
    assert cached.losses == copied.losses
    assert_same(state_of(cached), state_of(copied))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "32-true"])
@pytest.mark.parametrize("arguments", [{}, {"teacher_dtype": "bfloat16"}])
def test_the_teacher_computes_in_the_precision_of_the_run(precision, arguments):
    task, callback = Classifier(), distilled(**arguments)
    train(task, callback, precision=precision, max_steps=2)
    (dtype,) = {weight.dtype for weight in technique(callback)._teacher.module.parameters()}
    assert dtype == (torch.bfloat16 if arguments or precision == "bf16-true" else torch.float32)
    assert all(0 < loss < 10 for loss in task.losses)


# ------------------------------------------------------------------------------------- beside other things, errors


def test_nothing_is_left_in_the_module_between_batches():
    class Inspect(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            pickle.dumps(pl_module)
            torch.save(pl_module, io.BytesIO())
            twin = copy.deepcopy(pl_module)
            assert vars(twin).keys() == vars(pl_module).keys()
            assert "training_step" not in vars(pl_module)

    task, callback = Classifier(), distilled()
    train(task, callback, Inspect(), max_steps=3)
    again = pickle.loads(pickle.dumps(callback))
    assert_same(weights_of(technique(again)._teacher.module), weights_of(technique(callback)._teacher.module))


@pytest.mark.parametrize("calls_forward", [False, True])
def test_an_error_in_the_middle_leaves_nothing_behind(calls_forward):
    class Failing(Classifier):
        def step(self, x):
            super().step(x)
            raise RuntimeError("in the middle")

    task = Failing(calls_forward=calls_forward)
    with pytest.raises(RuntimeError, match="in the middle"):
        train(task, distilled())
    assert not {"training_step", "_compiled_call_impl"} & (vars(task).keys() | vars(task.net).keys())


def test_fitting_again_keeps_the_first_teacher_and_another_model_gets_its_own():
    task, callback = Classifier(), distilled()
    train(task, callback, max_steps=3)
    first = technique(callback)._teacher
    train(task, callback, max_steps=3)
    assert technique(callback)._teacher is first
    assert_same(weights_of(first.module), dict(Classifier().net.named_parameters()))
    train(Classifier(seed=4), callback, max_steps=3)
    assert_same(weights_of(technique(callback)._teacher.module), dict(Classifier(seed=4).net.named_parameters()))


@pytest.mark.skipif(not hasattr(pl_callbacks, "EMAWeightAveraging"), reason="this Lightning has no EMAWeightAveraging")
def test_beside_a_weight_average(tmp_path):
    with_ema, without = Classifier(), Classifier()
    callback = distilled()
    train(with_ema, callback, pl_callbacks.EMAWeightAveraging(decay=0.9), StepCheckpoint(tmp_path, [STEPS]))
    train(without, distilled())
    assert with_ema.losses == without.losses
    assert_same(weights_of(technique(callback)._teacher.module), dict(Classifier().net.named_parameters()))
    Classifier.load_from_checkpoint(tmp_path / f"step{STEPS}.ckpt", strict=True)


def test_the_loss_is_logged_as_the_mean_since_the_last_time():
    logged = []

    class Logger(pl.loggers.logger.DummyLogger):
        def log_metrics(self, metrics, step=None):
            logged.append((step, metrics.get("qat/distillation_loss"), metrics.get("qat/distillation_hidden_error")))

    task = Classifier()
    train(task, distilled(hidden="ReLU", hidden_weight=0.0), logger=[Logger()], log_every_n_steps=4)
    means = [sum(task.losses[start : start + 4]) / 4 for start in (0, 4)]
    assert [(step, loss) for step, loss, _ in logged] == [(3, pytest.approx(means[0])), (7, pytest.approx(means[1]))]
    assert all(error > 0 for _, _, error in logged)


def test_the_summary_says_what_is_learned_from_whom():
    told = []

    class Listen(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            told.append(technique(callback).describe())

    for arguments in (
        {"temperature": 2.0, "hidden": ["ReLU"], "hidden_weight": 0.5, "task_weight": 0.1},
        {"teacher": Classifier(seed=1), "teacher_dtype": "bfloat16", "loss": "mse"},
        {"teacher": the_logits},
    ):
        callback = distilled(**arguments)
        train(Classifier(), callback, Listen(), max_steps=1)
    unused = "(the loss of training_step is not used)"
    assert told == [
        "1 x kl of the outputs of Sequential at temperature 2 + 0.5 x error of 1 layers + 0.1 x loss of training_step; "
        "teacher: a copy of its weights (float32, 0.0 MiB), float as this callback first found them",
        f"1 x mse of the outputs of Sequential {unused}; teacher: the given Classifier (bfloat16, 0.0 MiB)",
        f"1 x kl of the outputs of Sequential at temperature 1 {unused}; "
        "teacher: what the_logits returns for the batch",
    ]


def the_logits(batch):
    return torch.zeros(8, 8)


class Manual(Classifier):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class TwoParts(Classifier):
    """The children are called one after the other, the module itself never."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(16, 8), nn.Linear(8, 8)
        del self.net

    def step(self, x):
        return self.head(self.body(x)).square().mean()


class Formless(TwoParts):
    forward = pl.LightningModule.forward


class OneLogit(Classifier):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(16, 1)

    def step(self, x):
        return self.net(x).square().mean()


class TupleOutput(Classifier):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16, 8)

        def forward(self, x):
            return self.linear(x), x

    def __init__(self):
        super().__init__()
        self.net = self.Net()

    def step(self, x):
        return self.net(x)[0].square().mean()


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (Manual, {}, "manual optimization.*Use automatic optimization, or lightning_qat.nn.distiller.Distiller"),
        (TwoParts, {}, r"TwoParts was not called.*module='\.\.\.'"),
        (Formless, {}, r"several children of Formless.*no forward.*module='\.\.\.'"),
        (Classifier, {"module": "nett"}, r"module='nett' does not exist; the children are \['net'\]"),
        (Classifier, {"module": "net.1"}, "ReLU has no quantized layer.*Name another module, or give a teacher"),
        (Classifier, {"hidden": "LlamaMLP"}, "pattern of hidden 'LlamaMLP' matches no module"),
        (Classifier, {"teacher": nn.Linear(16, 9)}, r"student gives \(8, 8\), the teacher \(8, 9\).*vocabulary"),
        (Classifier, {"teacher": lambda batch: batch[:, :0]}, r"student gives \(8, 8\), the teacher \(1, 0\)"),
        (OneLogit, {}, "Use loss='mse'"),
        (TupleOutput, {}, r"output \(tuple\) has no logits.*output="),
    ],
)
def test_what_cannot_work_is_refused_before_the_second_batch(make, arguments, message):
    task = make()
    with pytest.raises(QATConfigurationError, match=f"distillation: .*{message}|{message}"):
        train(task, distilled(**arguments))
    assert task.losses == []
    assert "training_step" not in vars(task)


def test_a_part_of_the_student_is_no_teacher():
    task = Classifier()
    for teacher in (task.net, task, task.net[3]):
        with pytest.raises(QATConfigurationError, match=r"part of the LightningModule.*Leave teacher out"):
            train(task, distilled(teacher=teacher))


def test_a_module_that_is_compiled_as_a_whole_is_refused():
    with pytest.raises(QATConfigurationError, match=r"Compile that module itself: self\.model = torch\.compile"):
        train(torch.compile(Classifier(), backend="eager"), distilled())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"task_weight": -1}, ValueError, "task_weight=-1 must be positive"),
        ({"weight": 0}, ValueError, "With weight=0 and no hidden layers nothing is distilled"),
        ({"teacher": "float"}, ValueError, "teacher='float' must be 'copy', a module"),
        ({"teacher": 3}, TypeError, "teacher=3 must be a module, a function"),
        ({"teacher_dtype": "int8"}, ValueError, "teacher_dtype='int8' must be a floating-point type"),
        ({"teacher_dtype": "half precision"}, ValueError, "must be a floating-point type"),
        ({"hidden": 3}, TypeError, "Expected patterns for module names"),
        ({"heat": 3}, TypeError, "unexpected keyword argument 'heat'. Its arguments are weight,"),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments, error, message):
    with pytest.raises(error, match=message):
        QATCallback("w4", distillation=arguments)


# ------------------------------------------------------------------------------------------------------------- DDP


def test_two_processes_train_as_by_hand_with_the_teacher_of_the_first_and_resume(tmp_path):
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.callbacks.ddp_distillation", str(tmp_path)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    ended = {path.stem: torch.load(path, weights_only=True) for path in tmp_path.glob("*.pt")}
    assert sorted(ended) == ["resumed0", "resumed1", "whole0", "whole1"]
    by_hand, losses = train_two_by_hand(Classifier(seed=10), Classifier(seed=10).eval(), num_steps=6)
    for rank in (0, 1):
        assert ended[f"whole{rank}"]["losses"] == losses[rank]
        assert ended[f"resumed{rank}"]["losses"] == losses[rank][3:]
    for each in ended.values():
        assert_same(each["teacher"], dict(Classifier(seed=10).net.named_parameters()))
        assert_same(each["weights"], dict(by_hand.net.named_parameters()))


def train_two_by_hand(task, teacher, num_steps):
    """Return the module, trained on the gradients of two halves of each batch, and the losses of each half."""
    prepare(task, "w2")
    optimizer, losses = torch.optim.AdamW(task.parameters(), 1e-2), ([], [])
    for index in range(num_steps):
        for half, own in zip(batch_at(index).chunk(2), losses, strict=True):
            torch.manual_seed(index)
            logits = task.net(half)
            loss = 0.0 * F.cross_entropy(logits, half[:, :8].argmax(1))
            loss = loss + kl_divergence(logits, teacher.net(half).detach())
            (loss / 2).backward()
            own.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return task, losses
