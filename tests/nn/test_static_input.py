"""Static inputs: quantizers, calibration without a Trainer, and quantization after training."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_qat import prepare, quantize_model, quantized_weights, restore_float
from lightning_qat.core import QuantScheme, fake_quantize, quantize
from lightning_qat.estimators import ClippedSTE
from lightning_qat.nn import (
    StaticInputConfig,
    StaticInputFakeQuantize,
    calibrate_inputs,
    quantized_inputs,
    set_num_bits,
    static_inputs,
)
from lightning_qat.nn.input_fake_quantize import InputFakeQuantize
from lightning_qat.observers import ACTIVATION_OBSERVERS, RunningMinMaxObserver


class Convnet(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
            self.norm = nn.BatchNorm2d(8)
            self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
            self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = self.norm(self.conv1(x)).relu()
        return self.fc(self.conv2(x).relu().mean((2, 3)))


def images(num_batches=4, scale=1.0):
    generator = torch.Generator().manual_seed(11)
    return [scale * torch.randn(6, 3, 8, 8, generator=generator) for _ in range(num_batches)]


def scheme_of(bits, symmetric=False):
    return QuantScheme(bits, symmetric=symmetric, granularity="tensor")


def make(bits=8, symmetric=False, learn=False, observer=None, sample_dims=1, estimator=None):
    config = StaticInputConfig(observer or RunningMinMaxObserver(), learn)
    return StaticInputFakeQuantize(scheme_of(bits, symmetric), estimator or ClippedSTE(), sample_dims, config=config)


def calibrate(quantizer, *batches):
    for batch in batches:
        quantizer.is_observing = True
        quantizer(batch)
        quantizer.take(quantizer.pending)
    quantizer.settle()
    return quantizer


# --------------------------------------------------------------------------------------------------- one quantizer


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_all_inputs_are_on_the_grid_of_the_calibrated_range(bits, symmetric, learn):
    first, second, later = torch.randn(5, 16), 2 * torch.randn(7, 16), 3 * torch.randn(2, 4, 16)
    quantizer = calibrate(make(bits, symmetric, learn), first, second)
    both = torch.cat([first, second])
    observer, scheme = RunningMinMaxObserver(), scheme_of(bits, symmetric)
    params = observer(observer.collect(both), scheme)
    assert torch.equal(quantizer(later), fake_quantize(later, params, scheme))
    assert len(quantizer(later).unique()) <= 2**bits
    found = quantizer.qparams()
    assert torch.equal(found.scale, params.scale)
    codes = quantize(later.flatten()[None], params, scheme)
    zero_point = 0 if found.zero_point is None else found.zero_point
    assert torch.equal((codes - zero_point) * found.scale, quantizer(later).flatten()[None])


def test_nothing_is_learned_from_inputs_unless_it_is_told_to():
    quantizer = make()
    x = torch.randn(4, 8)
    for mode in (True, False):
        quantizer.train(mode)
        assert torch.equal(quantizer(x), x)  # not calibrated: unchanged
        assert torch.equal(quantizer.pending, quantizer.config.observer.empty())
    calibrate(quantizer, x)
    before = copy.deepcopy(quantizer.get_extra_state())
    for mode in (True, False):
        quantizer.train(mode)
        quantizer(1000 * x)
    for name, value in quantizer.get_extra_state().items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(before[name])) if value is not None else True
    quantizer.eval()  # a frozen part of a model that is trained on
    quantizer.is_settled, quantizer.is_observing = False, True
    quantizer(1000 * x)
    assert quantizer.pending[1] > 500


def test_observing_changes_no_grid_until_the_batch_is_taken():
    """So that the forward pass which gradient checkpointing repeats finds the same grid."""
    layer = nn.Sequential(nn.Linear(8, 8))
    prepare(layer, "w8a4-static")
    quantizer = layer[0].input_fake_quant
    calibrate(quantizer, torch.randn(4, 8))
    quantizer.is_observing = True
    x = 10 * torch.randn(4, 8)
    x.requires_grad_()
    plain = torch.autograd.grad(layer(x).square().sum(), x)[0]
    repeated = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), x)[0]
    assert torch.equal(plain, repeated)
    scale = quantizer.scale.clone()
    quantizer.take(quantizer.pending)
    assert not torch.equal(quantizer.scale, scale)


def test_zeros_have_no_range_and_the_first_others_give_one():
    quantizer = calibrate(make(), torch.zeros(3, 4))
    assert not quantizer.is_calibrated
    x = torch.randn(3, 4)
    assert torch.equal(quantizer(x), x)
    calibrate(quantizer, x)
    assert quantizer.is_calibrated
    assert not torch.equal(quantizer(x), x)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_inputs_without_a_range_are_refused(bad):
    quantizer = make()
    quantizer.is_observing = True
    quantizer(torch.tensor([[1.0, bad]]))
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantizer.take(quantizer.pending)


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("name", ACTIVATION_OBSERVERS)
def test_on_another_rung_the_grid_is_found_anew_in_what_was_seen(name, learn):
    observer, some = ACTIVATION_OBSERVERS[name](), [torch.randn(50, 8) ** 3 for _ in range(4)]
    quantizer = make(2, learn=learn, observer=observer)
    quantizer.set_num_bits(8)
    calibrate(quantizer, *some)
    for bits in (8, 4, 3, 2, 4):
        if learn:
            with torch.no_grad():
                quantizer.log_scale_ratio.fill_(0.3)
                quantizer.zero_point_offset.fill_(0.2)
        quantizer.has_new_grid = False
        quantizer.set_num_bits(bits)
        scheme = scheme_of(bits)
        params = observer(quantizer.seen, scheme)
        if bits == 8:
            continue
        assert quantizer.has_new_grid
        assert torch.equal(quantizer.qparams().scale, params.scale)  # what was learned belonged to another grid
        assert torch.equal(quantizer.qparams().zero_point, params.zero_point)
        assert torch.equal(quantizer(some[0]), fake_quantize(some[0], params, scheme))
    quantizer.set_num_bits(16)
    assert torch.equal(quantizer(some[0]), some[0])


def test_nothing_is_observed_while_inputs_pass():
    quantizer = make(4)
    quantizer.set_num_bits(16)
    quantizer.is_observing = True
    quantizer(torch.randn(3, 4))
    assert torch.equal(quantizer.pending, quantizer.config.observer.empty())


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("name", ACTIVATION_OBSERVERS)
def test_state_goes_through_a_state_dict_at_every_point(name, learn):
    some = [torch.randn(20, 8) for _ in range(4)]

    def fresh():
        return make(4, learn=learn, observer=ACTIVATION_OBSERVERS[name]())

    for stop in range(4):
        quantizer = fresh()
        quantizer.set_num_bits(8)
        for batch in some[:stop]:
            quantizer.is_observing = True
            quantizer(batch)
            quantizer.take(quantizer.pending)
        quantizer.is_observing = True
        quantizer(some[3])  # pending
        quantizer.is_observing = False
        if learn and stop:
            with torch.no_grad():
                quantizer.log_scale_ratio.fill_(-0.1)
                quantizer.zero_point_offset.fill_(0.1)
        other = fresh()
        other.load_state_dict(copy.deepcopy(quantizer.state_dict()))
        for each in (other, copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))):
            assert torch.equal(each(some[0]), quantizer(some[0]))
            assert each.num_bits == 8
        assert not other.has_new_grid
        quantizer.take(quantizer.pending)
        other.take(other.pending)
        assert torch.equal(other.scale, quantizer.scale)
        assert torch.equal(other.seen, quantizer.seen)


def test_a_state_of_another_observer_or_scheme_is_refused():
    with pytest.raises(ValueError, match="another activation_observer or scheme"):
        make().load_state_dict(make(observer=ACTIVATION_OBSERVERS["mse"]()).state_dict())
    with pytest.raises(ValueError, match="another activation_observer or scheme"):
        make().load_state_dict(make(symmetric=True).state_dict())


def test_learned_grids_have_the_gradients_of_lsq_plus():
    """Closed form in float64, with g = 1 / sqrt(N Qp); N the features of a token, Qp all steps of the grid."""
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(2))
    gradient = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(3))
    quantizer = calibrate(make(4, learn=True), 0.5 * x)
    with torch.no_grad():
        quantizer.log_scale_ratio.fill_(0.1)
        quantizer.zero_point_offset.fill_(0.07)
    quantizer(x).backward(gradient)
    s0, z0 = quantizer.scale.double().item(), quantizer.zero_point.item()
    s = quantizer.qparams().scale.double().item()
    z = round(z0 + 15 * 0.07)
    assert s == pytest.approx(s0 * math.exp(0.1))
    v = x.double() / s
    low, high = -8 - z, 7 - z
    outside = (v < low) | (v > high)
    assert 10 < outside.sum() < 230
    by_scale = torch.where(outside, v.clamp(low, high), v.round() - v)
    of_scale = (gradient.double() * by_scale).sum().item()
    of_zero_point = -s * gradient.double()[outside].sum().item()
    g = 1 / math.sqrt(16 * 15)
    assert quantizer.log_scale_ratio.grad.item() == pytest.approx(g / s * of_scale, rel=1e-4)
    assert quantizer.zero_point_offset.grad.item() == pytest.approx(g / (15 * s0) ** 2 * 15 * of_zero_point, rel=1e-4)


def test_features_of_one_sample_of_a_convolution_count_for_its_gradient_scale():
    x = torch.randn(4, 2, 3, 3)
    whole, split = (calibrate(make(4, learn=True, sample_dims=dims), x) for dims in (3, 1))
    for quantizer in (whole, split):
        quantizer(x).sum().backward()
    ratio = whole.log_scale_ratio.grad / split.log_scale_ratio.grad
    assert ratio.item() == pytest.approx(math.sqrt(3 / 18), rel=1e-4)


def test_the_zero_point_of_inputs_after_a_relu_is_not_learned():
    x = torch.randn(30, 8)
    for inputs, moves in ((x, True), (x.relu(), False)):
        quantizer = calibrate(make(4, learn=True), 0.5 * inputs)
        quantizer(inputs).sum().backward()
        assert (quantizer.zero_point_offset.grad != 0) == moves


def test_another_estimator_rounds_learned_grids_too():
    class Doubling(ClippedSTE):
        def __call__(self, x, low, high):
            return 2 * super().__call__(x, low, high) - super().__call__(x, low, high).detach()

    x = torch.randn(6, 8)
    plain, doubled = (calibrate(make(4, learn=True, estimator=each), x) for each in (ClippedSTE(), Doubling()))
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [quantizer(each) for quantizer, each in zip((plain, doubled), inputs, strict=True)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.sum().backward()
    assert torch.allclose(inputs[1].grad, 2 * inputs[0].grad)


def test_parameters_stay_in_the_graph_before_there_is_a_grid():
    quantizer = make(4, learn=True)
    for bits in (4, 16):
        quantizer.set_num_bits(bits)
        quantizer.zero_grad()
        quantizer(torch.randn(3, 4)).sum().backward()
        assert all(parameter.grad == 0 for parameter in quantizer.parameters())


@pytest.mark.parametrize("learn", [False, True])
def test_empty_inputs_pass(learn):
    quantizer = make(4, learn=learn)
    quantizer.is_observing = True
    assert quantizer(torch.zeros(0, 4)).shape == (0, 4)
    calibrate(quantizer, torch.randn(3, 4))
    assert quantizer(torch.zeros(0, 4)).shape == (0, 4)


def test_scales_are_rounded_to_their_dtype_before_they_are_used():
    scheme = QuantScheme(8, symmetric=False, granularity="tensor", scale_dtype="bfloat16")
    quantizer = StaticInputFakeQuantize(scheme, ClippedSTE(), 1, config=StaticInputConfig(learn=True))
    calibrate(quantizer, torch.randn(40, 8))
    with torch.no_grad():
        quantizer.log_scale_ratio.fill_(0.123)
    scale = quantizer.qparams().scale
    assert torch.equal(scale, scale.bfloat16().float())


# ----------------------------------------------------------------------------------------------- dynamic inputs


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_dynamic_inputs_are_those_of_torchao(bits, symmetric):
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    x = torch.randn(5, 7, 64) * torch.linspace(0.1, 30, 7).view(7, 1)
    x[0, 0], x[0, 1] = 0.0, x[0, 1].abs()  # all zeros; no negative value
    mapping = primitives.MappingType.SYMMETRIC if symmetric else primitives.MappingType.ASYMMETRIC
    shape, dtypes = (1, 1, 64), {"scale_dtype": torch.float32, "zero_point_dtype": torch.int32}
    scale, zero_point = primitives.choose_qparams_affine(
        x, mapping, shape, torch.int8, qmin, qmax, eps=torch.finfo(torch.float32).smallest_normal, **dtypes
    )
    codes = primitives.quantize_affine(x, shape, scale, zero_point, torch.int8, qmin, qmax)
    expected = primitives.dequantize_affine(codes, shape, scale, zero_point, torch.int8, qmin, qmax)
    quantizer = InputFakeQuantize(QuantScheme(bits, symmetric=symmetric, granularity="token"), ClippedSTE(), 1)
    assert torch.allclose(quantizer(x), expected, rtol=1e-6, atol=0)


# ----------------------------------------------------------------------------------------------------- whole models


def test_prepare_keeps_calibrated_quantizers_unless_something_else_is_asked_for():
    model = Convnet()
    prepare(model, "w4a8-static", activation_observer="mse")
    calibrate_inputs(model, images())
    before = static_inputs(model)
    prepare(model, "w4a8-static", activation_observer="mse")
    assert all(static_inputs(model)[name] is each for name, each in before.items())
    for change in (
        {"scheme": "w4a4-static"},
        {"activation_observer": "percentile"},
        {"learn_activations": True},
        {"estimator": ClippedSTE(margin=0.0)},
    ):
        other = copy.deepcopy(model)
        prepare(other, **{"scheme": "w4a8-static", "activation_observer": "mse", **change})
        assert not any(each.is_calibrated for each in static_inputs(other).values())
    prepare(model, "w4a8")
    assert not static_inputs(model)
    restore_float(model)
    assert list(model.state_dict()) == list(Convnet().state_dict())


def test_calibration_without_a_trainer_and_the_grids_read_out():
    model = Convnet()
    rules = [{"target": "*", "scheme": "w4a4-static"}, {"target": "conv1", "scheme": "w8a8-static"}]
    prepare(model, rules, activation_observer="minmax")
    with pytest.raises(ValueError, match=r"inputs of conv1, conv2, fc have no grid yet.*calibrate_inputs"):
        quantized_inputs(model)
    calibrate_inputs(model, images())
    grids, inputs = quantized_inputs(model), torch.cat(images())
    assert list(grids) == ["conv1", "conv2", "fc"]
    range_ = (inputs.max() - inputs.min()).item()
    assert grids["conv1"].scale.item() == pytest.approx(range_ / 255, rel=1e-6)
    assert grids["conv2"].zero_point == grids["fc"].zero_point == -8  # after ReLU
    assert set(quantized_weights(model)) == set(grids)
    expected = grids["fc"].scale.clone()
    calibrate_inputs(model, images(scale=10.0))  # anew
    assert torch.equal(grids["fc"].scale, expected)  # a copy
    assert quantized_inputs(model)["conv1"].scale.item() == pytest.approx(10 * range_ / 255, rel=1e-5)
    set_num_bits(model, 16)
    with pytest.raises(ValueError, match="no grid yet"):
        quantized_inputs(model)


def test_a_layer_is_calibrated_on_what_the_quantized_layers_before_it_give():
    model = Convnet().eval()
    prepare(model, "w2a2-static")
    calibrate_inputs(model, images(1) * 3)
    seen = []
    model.fc.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(images(1)[0])
    top = static_inputs(model)["fc"].seen[1].item()
    assert seen[0].max() <= top * (1 + 1e-6)
    assert not model.training


def test_what_cannot_be_calibrated_is_refused():
    model = Convnet()
    with pytest.raises(ValueError, match="no static inputs to calibrate"):
        calibrate_inputs(model, images())
    prepare(model, "w4a4-static")
    with pytest.raises(ValueError, match="No input but zeros reached conv1, conv2, fc"):
        calibrate_inputs(model, [])
    with pytest.raises(ValueError, match="inputs of conv1, conv2, fc were NaN"):
        calibrate_inputs(model, [torch.full((1, 3, 8, 8), math.nan)])
    set_num_bits(model, 16)
    with pytest.raises(ValueError, match="is at 16 bits"):
        calibrate_inputs(model, images())


def test_float_weights_that_are_loaded_get_grids_of_their_own():
    model, other = Convnet(), Convnet(seed=1)
    prepare(model, "w4a4-static", learn_activations=True)
    calibrate_inputs(model, images())
    model.load_state_dict(other.state_dict())
    assert not any(each.is_calibrated or each.is_settled for each in static_inputs(model).values())


def test_meta_grids_take_what_is_loaded():
    model = Convnet()
    prepare(model, "w4a4-static", activation_observer="mse")
    calibrate_inputs(model, images())
    with torch.device("meta"):
        other = Convnet()
    prepare(other, "w4a4-static", activation_observer="mse")
    other.load_state_dict(model.state_dict(), assign=True)
    grids = quantized_inputs(model)
    for name, quantizer in static_inputs(other).items():
        assert torch.equal(quantizer.scale, grids[name].scale[0])
        assert quantizer.is_calibrated
    model.to("meta")
    model.to_empty(device="cpu")
    assert not any(each.is_calibrated for each in static_inputs(model).values())


def test_the_grid_stays_in_float32_when_the_model_changes_dtype():
    model = Convnet()
    prepare(model, "w4a4-static", learn_activations=True)
    calibrate_inputs(model, images())
    grids = quantized_inputs(model)
    model.bfloat16()
    for name, quantizer in static_inputs(model).items():
        assert torch.equal(quantizer.qparams().scale, grids[name].scale)
        assert {parameter.dtype for parameter in quantizer.parameters()} == {torch.float32}
    assert model(images()[0].bfloat16()).dtype == torch.bfloat16


def test_descriptions_say_whether_a_grid_is_there():
    model = nn.Sequential(nn.Linear(8, 8))
    prepare(model, "w4a8-static", learn_activations=True)
    assert "8 bits per tensor (static), asymmetric, to be learned)" in repr(model)
    calibrate_inputs(model, [torch.randn(4, 8)])
    assert "8 bits per tensor (static), asymmetric, learned)" in repr(model)


# ------------------------------------------------------------------------------------------------------- compiling


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("name", ["minmax", "mse"])
def test_one_graph_serves_calibration_and_one_every_rung(name, learn):
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8))
    prepare(model, "w8a2-static", activation_observer=name, learn_activations=learn)
    eager, x = copy.deepcopy(model), torch.randn(4, 32)
    both = [quantizer for each in (model, eager) for quantizer in static_inputs(each).values()]
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for quantizer in both:
        quantizer.is_observing = True
    for bits, factor in ((16, 1), (16, 2), (8, 1), (8, 2), (4, 3)):
        for each in (model, eager):
            set_num_bits(each, bits)
        assert torch.equal(compiled(factor * x), eager(factor * x))
        for quantizer in both:
            quantizer.take(quantizer.pending)
    assert counter.frame_count == 1
    for quantizer in both:
        assert quantizer.is_calibrated
        quantizer.settle()
    for bits in (8, 4, 3, 2, 16, 4):
        for each in (model, eager):
            set_num_bits(each, bits)
        assert torch.equal(compiled(x), eager(x))
    assert counter.frame_count == 2


def test_a_learned_grid_compiles_with_its_gradients():
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(32, 16))
    prepare(model, "w8a4-static", learn_activations=True)
    x = torch.randn(4, 32)
    calibrate_inputs(model, [0.5 * x])
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for each in (compiled, eager):
        each(x).square().sum().backward()
    for (name, own), (_, expected) in zip(model.named_parameters(), eager.named_parameters(), strict=True):
        assert torch.allclose(own.grad, expected.grad, rtol=1e-5), name


# --------------------------------------------------------------------------------- quantization after training


@pytest.mark.parametrize("sequential", [False, True])
def test_quantize_model_calibrates_static_inputs_on_the_batches(sequential):
    model = Convnet().eval()
    fed = {}
    for name in ("conv1", "conv2", "fc"):
        seen = fed.setdefault(name, [])
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
    with torch.no_grad():
        for batch in images():
            model(batch)
    ranges = {name: torch.stack(torch.cat(each).aminmax()) for name, each in fed.items()}
    model = Convnet().eval()
    results = quantize_model(
        model,
        images(),
        methods=("rtn", "gptq"),
        bits=(8, 4),
        scheme="w4a4-static",
        activation_observer="minmax",
        sequential=sequential,
        progress=False,
    )
    assert not static_inputs(model)
    for method, bits in (("rtn", 4), ("gptq", 8)):
        applied = results.apply(copy.deepcopy(model), method, bits)
        for name, params in quantized_inputs(applied).items():
            low, high = ranges[name][0].clamp(max=0), ranges[name][1].clamp(min=0)
            assert params.scale.item() == pytest.approx(((high - low) / (2**bits - 1)).item(), rel=1e-5)
        assert applied.fc.input_fake_quant.num_bits == bits
        assert torch.isfinite(applied(images()[0])).all()


def test_quantize_model_takes_another_observer_and_refuses_layers_without_inputs():
    class Idle(Convnet):
        def __init__(self):
            super().__init__()
            self.idle = nn.Linear(4, 4)

    results = quantize_model(
        Convnet().eval(),
        images(),
        methods=["rtn"],
        scheme="w4a4-static",
        activation_observer="percentile",
        progress=False,
    )
    applied = results.apply(Convnet().eval(), "rtn", 4)
    assert type(static_inputs(applied)["fc"].config.observer).__name__ == "PercentileObserver"
    with pytest.raises(ValueError, match="No input but zeros reached idle"):
        quantize_model(Idle().eval(), images(), methods=["rtn"], scheme="w4a4-static", progress=False)
    with pytest.warns(UserWarning, match="inputs of idle stay in float"):
        results = quantize_model(
            Idle().eval(), images(), methods=["rtn"], scheme="w4a4-static", unseen="rtn", progress=False
        )
    applied = results.apply(Idle().eval(), "rtn", 4)
    x = torch.randn(2, 4)
    assert torch.equal(applied.idle.input_fake_quant(x), x)
