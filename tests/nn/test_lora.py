"""LoRA layers of PEFT are quantized as they are deployed: fq(W + BA)."""

import copy
import warnings

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from lightning_qat import QATCallback, load_qat, quantize_model, restore_float
from lightning_qat.callbacks.errors import QATConfigurationError
from lightning_qat.callbacks.step_checkpoint import StepCheckpoint
from lightning_qat.core import fake_quantize
from lightning_qat.core.scheme import QuantScheme
from lightning_qat.nn import prepare, quantized_layers, quantized_weights, set_num_bits
from lightning_qat.nn.bits import bit_report
from lightning_qat.nn.float_model import copy_weights, weights_of
from lightning_qat.nn.teacher import CopyTeacher
from lightning_qat.observers import MinMaxObserver
from tests.callbacks.test_checkpoints import assert_same, state_of
from tests.helpers import batch_at, loader, make_trainer

peft = pytest.importorskip("peft", reason="peft is not installed")
Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D

SCHEME = "w4g8"


class Net(nn.Module):
    """Two layers with adapters, of which the second may be a Conv1D, and one without."""

    def __init__(self, kind="linear"):
        super().__init__()
        self.first, self.plain = nn.Linear(16, 32), nn.Linear(32, 32)
        self.last = nn.Linear(32, 8) if kind == "linear" else Conv1D(8, 32)

    def forward(self, x):
        return self.last(torch.relu(self.plain(torch.relu(self.first(x)))))


def make(kind="linear", dtype=torch.float32, adapters=("default",), **options):
    torch.manual_seed(0)
    options = {"target_modules": ["first", "last"], "r": 4, "lora_alpha": 8, "init_lora_weights": False, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that it sets fan_in_fan_out
        model = peft.get_peft_model(Net(kind).to(dtype), peft.LoraConfig(**options))
        for name in adapters[1:]:
            model.add_adapter(name, peft.LoraConfig(**options))
    model.base_model.set_adapter(list(adapters))
    return model


def merged(model):
    return copy.deepcopy(model).merge_and_unload()


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapters", [("default",), ("default", "second")])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"lora_bias": True}])
def test_codes_and_outputs_are_those_of_the_merged_model(kind, dtype, adapters, options):
    model = make(kind, dtype, adapters, **options)
    deployed = merged(model)
    prepare(model, SCHEME)
    prepare(deployed, SCHEME)
    found, expected = quantized_weights(model), quantized_weights(deployed)
    assert {name.removeprefix("base_model.model.") for name in found} == set(expected) == {"first", "plain", "last"}
    for name, weight in expected.items():
        own = found[f"base_model.model.{name}"]
        assert torch.equal(own.codes, weight.codes)
        assert torch.equal(own.params.scale, weight.params.scale)
    x = batch_at(0).to(dtype)
    assert torch.equal(model.eval()(x), deployed.eval()(x))


def test_autocast_does_not_change_the_codes():
    model = make()
    prepare(model, SCHEME)
    layer = model.base_model.model.first
    expected = layer.fake_quantized_weight()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.fake_quantized_weight(), expected)


def test_gradients_are_those_of_the_fake_quantized_sum():
    model = make()
    prepare(model, SCHEME)
    layer, x = model.base_model.model.first, batch_at(1)
    down, up = (getattr(layer, part)["default"].weight for part in ("lora_A", "lora_B"))
    layer(x).square().sum().backward()
    found = down.grad.clone(), up.grad.clone()
    down.grad = up.grad = None
    scheme = QuantScheme.parse(SCHEME)
    weight = layer.base_layer.weight + up @ down * 2
    params = MinMaxObserver()(weight.detach(), scheme, scheme.levels())
    estimator = layer.weight_fake_quant.config.estimator
    weight = fake_quantize(weight, params, scheme, scheme.levels(), estimator)
    F.linear(x, weight, layer.base_layer.bias).square().sum().backward()
    torch.testing.assert_close(found, (down.grad, up.grad))
    assert layer.base_layer.weight.grad is None


def test_dropout_gives_adapters_the_gradient_of_lora():
    """With weights on the grid already, so that rounding is no part of it."""
    model = make(lora_dropout=0.5)
    twin = copy.deepcopy(model)
    prepare(model, SCHEME)
    set_num_bits(model, 16)
    losses = []
    for each in (model, twin):
        torch.manual_seed(3)
        layer = each.train().base_model.model.first
        losses.append(layer(batch_at(2)).square().sum())
        losses[-1].backward()
    torch.testing.assert_close(*losses)
    for (name, own), (_, other) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert (own.grad is None) == (other.grad is None), name
        if own.grad is not None:
            torch.testing.assert_close(own.grad, other.grad)
    assert torch.equal(model.eval()(batch_at(2)), model(batch_at(2)))


def test_disabled_and_merged_adapters_are_left_out():
    model = make()
    plain = copy.deepcopy(model).unload()
    prepare(model, SCHEME)
    prepare(plain, SCHEME)
    x = batch_at(0)
    with model.disable_adapter():
        assert torch.equal(model(x), plain(x))
    expected = model(x)
    model.merge_adapter()
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_peft_merges_a_quantized_model_into_one_with_the_same_codes(kind):
    model = make(kind)
    prepare(model, "w4g8a8")
    expected, x = quantized_weights(model), batch_at(0)
    output, names = model.eval()(x), set(merged(make(kind)).state_dict())
    deployed = model.merge_and_unload()
    found = quantized_weights(deployed)
    assert {f"base_model.model.{name}" for name in found} == set(expected)
    for name, weight in found.items():
        assert torch.equal(weight.codes, expected[f"base_model.model.{name}"].codes)
    assert torch.equal(deployed(x), output)
    restore_float(deployed)
    assert set(deployed.state_dict()) == names


def test_peft_cannot_drop_the_adapters_of_a_quantized_model():
    model = make()
    prepare(model, SCHEME)
    with pytest.raises(ValueError, match="restore_float"):
        model.unload()
    restore_float(model)
    model.unload()


def test_rows_with_adapters_of_their_own_are_refused():
    model = make()
    prepare(model, SCHEME)
    with pytest.raises(ValueError, match="Leave adapter_names out"):
        model.base_model.model.first(batch_at(0), adapter_names=["default"] * 8)


def test_bits_count_the_merged_weight_only():
    model = make()
    deployed = merged(model)
    prepare(model, SCHEME)
    prepare(deployed, SCHEME)
    assert bit_report(model) == bit_report(deployed)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_dora": True}, "use_dora=False"),
        ({"target_modules": ["conv"]}, "no quantized form of lora.Conv2d: merge it first"),
        ({"target_modules": ["embed"]}, "no quantized form of lora.Embedding: merge it first"),
    ],
)
def test_other_adapters_stay_in_float_with_a_reason_or_are_refused(options, reason):
    class Several(Net):
        def __init__(self):
            super().__init__()
            self.conv, self.embed = nn.Conv2d(1, 4, 3), nn.Embedding(8, 16)

    options = {"target_modules": ["first"], "r": 2, **options}
    model = peft.get_peft_model(Several(), peft.LoraConfig(**options))
    (target,) = options["target_modules"]
    plan = prepare(model, SCHEME, ignore=["conv"] if target != "conv" else ())
    assert reason in plan.skipped[f"base_model.model.{target}"]
    assert not any("lora_" in name or "base_layer" in name for name in {*quantized_layers(model), *plan.skipped})
    restore_float(model)
    with pytest.raises(ValueError, match=reason):
        prepare(model, [{"target": "*", "scheme": SCHEME}, {"target": target, "scheme": SCHEME}], ignore=())


def test_a_saved_module_is_quantized_in_the_copy_that_trains():
    model = make(target_modules=["first"], modules_to_save=["last"])
    plan = prepare(model, SCHEME)
    assert [layer.name.removeprefix("base_model.model.") for layer in plan.layers] == [
        "first",
        "plain",
        "last.modules_to_save.default",
    ]
    assert "replaced it" in plan.skipped["base_model.model.last.original_module"]


def test_a_saved_head_stays_in_float_unless_asked_for():
    class Headed(Net):
        def __init__(self):
            super().__init__()
            self.lm_head = self.last
            del self.last

        def forward(self, x):
            return self.lm_head(torch.relu(self.plain(torch.relu(self.first(x)))))

    config = peft.LoraConfig(target_modules=["first"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(Headed(), config)
    assert len(prepare(model, SCHEME).layers) == 2
    rules = [{"target": "*", "scheme": SCHEME}, {"target": "lm_head", "scheme": "w8"}]
    assert str(prepare(model, rules).layers[-1].scheme) == "w8"


def test_adapters_on_a_shared_weight_are_refused():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(Tied(), peft.LoraConfig(target_modules=["first"]))
    with pytest.raises(ValueError, match="adapters would make two of it"):
        prepare(model, SCHEME)


# ------------------------------------------------------------------------------------------ quantization after training


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("sequential", [False, True])
def test_ptq_of_adapters_is_ptq_of_the_merged_model(kind, sequential):
    model = make(kind).eval()
    deployed, batches = merged(model).eval(), [batch_at(index) for index in range(3)]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    arguments = {"scheme": SCHEME, "methods": ["rtn", "gptq"], "progress": False, "sequential": sequential}
    found, expected = (quantize_model(each, batches, **arguments) for each in (model, deployed))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for method in ("rtn", "gptq"):
        own = {name.removeprefix("base_model.model."): each for name, each in found.weights[method, 4].items()}
        for name, weight in expected.weights[method, 4].items():
            difference = (own[name].codes != weight.codes).float().mean().item()
            # GPTQ's inputs differ by the rounding of W x + B A x.
            assert difference == 0 if method == "rtn" else difference < 0.01, (method, name)
        applied = found.apply(copy.deepcopy(model), method, 4).eval()
        again = expected.apply(copy.deepcopy(deployed), method, 4).eval()
        for name, layer in quantized_layers(applied).items():
            assert torch.equal(layer.quantized_weight().codes, found.weights[method, 4][name].codes)
        if method == "rtn":
            torch.testing.assert_close(applied(batch_at(9)), again(batch_at(9)))


# ------------------------------------------------------------------------------------------------------- in a Trainer


class AdaptedTask(pl.LightningModule):
    """Learns a fixed map with adapters; batches depend on nothing but the step."""

    def __init__(self, seed=0, **options):
        super().__init__()
        with torch.random.fork_rng():
            self.net = make(**options)
            torch.manual_seed(seed)
        self.register_buffer("target", torch.randn(16, 8, generator=torch.Generator().manual_seed(7)))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x = batch_at(self.trainer.fit_loop.total_batch_idx)
        return F.mse_loss(self(x), torch.tanh(x @ self.target))

    def configure_optimizers(self):
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, 1e-2, weight_decay=0.0)


def fit(task, callback, steps=10, ckpt_path=None, callbacks=()):
    trainer = make_trainer(callback, *callbacks, max_steps=steps)
    trainer.fit(task, loader(), ckpt_path=ckpt_path)
    return trainer


def make_callback(**options):
    arguments = {"schedule": [8, 4], "scale_lr": 1e-3, "distillation": {"task_weight": 1.0}, "freeze_at": 0.8}
    return QATCallback(SCHEME, **{**arguments, **options})


def test_training_moves_adapters_and_scales_only_and_resumes_to_the_bit(tmp_path):
    task = AdaptedTask()
    before = {name: value.clone() for name, value in task.state_dict().items()}
    saver = StepCheckpoint(tmp_path, [6])
    trainer = fit(task, make_callback(), callbacks=(saver,))
    moved = {
        name for name, value in task.state_dict().items() if name in before and not torch.equal(value, before[name])
    }
    assert moved
    assert all("lora_" in name for name in moved)

    resumed = AdaptedTask()
    fit(resumed, make_callback(), ckpt_path=saver.path(6))
    assert_same(state_of(resumed), state_of(task))

    trainer.save_checkpoint(tmp_path / "last.ckpt")
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    AdaptedTask().load_state_dict(content["state_dict"], strict=True)  # without the plugin
    loaded, expected = quantized_weights(load_qat(AdaptedTask(), content)), quantized_weights(task)
    assert all(torch.equal(weight.codes, expected[name].codes) for name, weight in loaded.items())
    task.net.save_pretrained(tmp_path / "adapters")
    assert all("lora_" in name for name in load_file(tmp_path / "adapters" / "adapter_model.safetensors"))


def test_the_teacher_shares_the_frozen_weights():
    task, callback = AdaptedTask(), make_callback()
    fit(task, callback, steps=2)
    teacher = next(each for each in callback.techniques if each.name == "distillation")._teacher
    assert isinstance(teacher, CopyTeacher)
    assert "a copy of the adapters" in teacher.describe()
    own = {name: each for name, each in task.net.named_parameters() if not name.endswith("log_scale_ratio")}
    assert {n: each.data_ptr() == own[n].data_ptr() for n, each in teacher.module.named_parameters()} == {
        name: "lora_" not in name for name in own
    }


def test_a_teacher_whose_shared_weights_change_is_an_error():
    class Unfreeze(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 3:
                with torch.no_grad():
                    pl_module.net.base_model.model.first.base_layer.weight.add_(0.1)

    with pytest.raises(QATConfigurationError, match="teacher='copy'"):
        fit(AdaptedTask(), make_callback(), callbacks=(Unfreeze(),))


@pytest.mark.parametrize(
    "options", [{"oscillation": {"dampening": 0.1}}, {"init": {"method": "gptq", "weights": True}}]
)
def test_what_writes_weights_is_refused(tmp_path, options):
    with pytest.raises(QATConfigurationError, match="trains by adapters"):
        fit(AdaptedTask(), make_callback(**options))


def test_grids_can_be_initialised_and_oscillation_measured():
    callback = make_callback(
        init={"method": "gptq", "calibration_data": [batch_at(index) for index in range(4)]}, oscillation=True
    )
    task = AdaptedTask()
    trainer = fit(task, callback)
    assert trainer.global_step == 10
    assert task.net.base_model.model.first.weight_fake_quant.log_scale_ratio.abs().max() > 0


def test_a_saved_teacher_leaves_the_students_weights_alone():
    """A layer that trained in the run before, and is frozen now, is not the teacher's any more."""
    before, after = make(), make()
    saved = {name: each.clone() for name, each in weights_of(before).items()}
    plain = after.base_model.model.plain.weight
    with torch.no_grad():
        plain.mul_(2)
    expected = plain.clone()
    prepare(after, SCHEME)
    teacher = CopyTeacher(after, share=True)
    teacher.unshare(saved)
    copy_weights(saved, teacher.module)
    assert torch.equal(plain, expected)
    assert torch.equal(teacher.module.base_model.model.plain.weight, saved["base_model.model.plain.weight"])


def test_adapters_around_quantized_layers_are_refused():
    model = Net()
    prepare(model, SCHEME)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["first"]))
    with pytest.raises(ValueError, match=r"restore_float\(model\) first"):
        prepare(model, SCHEME)
