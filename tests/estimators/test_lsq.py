"""LSQ's learned scales against the paper's formulas in float64."""

import pytest
import torch

from lightning_qat.core import QuantScheme, group_view, round_scale
from lightning_qat.estimators import ClippedSTE
from lightning_qat.estimators.lsq import log_scale, lsq_factor, round_straight_through, scale_gradient
from lightning_qat.nn import FakeQuantizeConfig, WeightFakeQuantize
from lightning_qat.observers import MinMaxObserver, MSEObserver

SCHEMES = ["w4", "w3g16", "w2", "w2g16-nozero", "w1.58", "w1", "w4-tensor", "w8"]


def quantizer_for(text, weight, observer=None):
    config = FakeQuantizeConfig(QuantScheme.parse(text), observer or MSEObserver(), ClippedSTE(), True)
    quantizer = WeightFakeQuantize(config, *weight.shape)
    quantizer.observe(weight)
    return quantizer


def lsq_gradient(weight, upstream, scale, scheme, num_values):
    """``dL/ds`` by equation 3 of arXiv:1902.08153, times ``1 / sqrt(N * Qp)``, in float64."""
    levels = scheme.levels()
    x = group_view(weight.double(), scheme) / scale.double().unsqueeze(-1)
    steps = (x - levels.zero_offset).round().clamp(levels.qmin, levels.qmax) + levels.zero_offset
    inside = (x - levels.zero_offset > levels.qmin) & (x - levels.zero_offset < levels.qmax)
    gradient = (torch.where(inside, steps - x, steps) * group_view(upstream.double(), scheme)).sum(-1)
    return gradient / (num_values * max(levels.qmax, 1)) ** 0.5


@pytest.mark.parametrize("text", SCHEMES)
def test_one_step_of_sgd_changes_the_scale_as_lsq_does(text):
    weight, upstream = torch.randn(6, 48) * 0.1, torch.randn(6, 48)
    quantizer = quantizer_for(text, weight)
    scheme = quantizer.scheme
    before = quantizer.qparams(weight).scale.detach()
    position = group_view(weight, scheme) / before.unsqueeze(-1) - scheme.levels().zero_offset
    is_tie = ((position % 1 - 0.5).abs() < 1e-3).reshape(weight.shape)  # float32 and float64 may round it differently
    upstream = upstream.masked_fill(is_tie, 0.0)
    num_values = weight.numel() // before.numel()
    quantizer(weight).backward(upstream)
    gradient = quantizer.log_scale_ratio.grad.view_as(before)
    expected = lsq_gradient(weight, upstream, before, scheme, num_values)
    # What summing qmax * N in float32 can lose: steps and positions are summed separately, and nearly cancel.
    rounding = 1.2e-7 * 2 * max(scheme.levels().qmax, 1) * num_values * upstream.abs().max().double()
    rounding *= lsq_factor(num_values, scheme.levels().qmax).double()
    assert torch.allclose(gradient.double() * before, expected, rtol=1e-4, atol=float(rounding))
    lr = 1e-3 / gradient.abs().max().item()  # the largest scale changes by a thousandth
    torch.optim.SGD([quantizer.log_scale_ratio], lr).step()
    change = quantizer.qparams(weight).scale.detach().double() - before.double()
    assert torch.allclose(change, -lr * expected, rtol=1e-2, atol=2e-6 * float(before.max()) + lr * float(rounding))


def test_the_factor_is_the_papers():
    assert lsq_factor(64, 7).item() == pytest.approx(1 / (64 * 7) ** 0.5)
    assert lsq_factor(64, torch.tensor(0.0)).item() == pytest.approx(1 / 8)


def test_a_scaled_gradient_leaves_the_value_alone():
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    factor = torch.rand(5, dtype=torch.float64)
    y = scale_gradient(x, factor)
    assert torch.equal(y, x)
    (y**2).sum().backward()
    assert torch.equal(x.grad, 2 * x.detach() * factor)


@pytest.mark.parametrize("step", [-50.0, 50.0])
def test_scales_stay_positive_and_finite_whatever_the_optimizer_does(step):
    ratio = torch.full((3,), step)
    scale = log_scale(torch.tensor([1e-3, 1.0, 10.0]), ratio, torch.tensor(1.0))
    assert (scale > 0).all()
    assert torch.isfinite(scale).all()


def test_what_was_learned_is_forgotten_on_a_new_grid():
    weight = torch.randn(4, 32)
    quantizer = quantizer_for("w2", weight, MinMaxObserver())
    with torch.no_grad():
        quantizer.log_scale_ratio.add_(0.5)
    quantizer.set_num_bits(4)
    expected = MinMaxObserver()(weight, QuantScheme.parse("w4")).scale
    assert torch.equal(quantizer.qparams(weight).scale, expected)


def test_a_group_of_zeros_has_a_finite_gradient():
    weight = torch.randn(4, 32)
    weight[1] = 0
    quantizer = quantizer_for("w4", weight)
    quantizer(weight).square().sum().backward()
    assert torch.isfinite(quantizer.log_scale_ratio.grad).all()
    assert quantizer.log_scale_ratio.grad[1] == 0


@pytest.mark.parametrize(("ratio", "expected"), [(0.0, 1.0), (1.5, 1.0), (-1.5, 2.718281828 ** (-3.0))])
def test_far_from_where_it_began_a_step_is_that_of_lsq_or_smaller(ratio, expected):
    """A step of SGD changes ``s`` by ``-lr * g * dL/ds``; below the observed scale by ``(s / s0)**2`` of that."""
    log_ratio = torch.full((1,), ratio, requires_grad=True)
    scale = log_scale(torch.tensor([0.25]), log_ratio, torch.tensor(0.1))
    (3.0 * scale).sum().backward()
    change = scale.item() * log_ratio.grad.item()  # ds = s * d(log s)
    assert change == pytest.approx(0.1 * 3.0 * expected, rel=1e-5)


@pytest.mark.parametrize("margin", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("text", ["w3", "w2g16-nozero", "w4-asym"])
def test_weights_get_the_gradient_of_the_estimator_and_scales_that_of_lsq_whatever_its_margin(text, margin):
    weight, upstream = torch.randn(6, 48) * 0.1, torch.randn(6, 48)
    scheme = QuantScheme.parse(text)
    learned = WeightFakeQuantize(FakeQuantizeConfig(scheme, MSEObserver(), ClippedSTE(margin), True), *weight.shape)
    fixed = WeightFakeQuantize(FakeQuantizeConfig(scheme, MSEObserver(), ClippedSTE(margin)), *weight.shape)
    gradients, outputs = [], []
    for quantizer in (learned, fixed):
        quantizer.observe(weight)
        leaf = weight.clone().requires_grad_()
        outputs.append(quantizer(leaf))
        outputs[-1].backward(upstream)
        gradients.append(leaf.grad)
    assert torch.equal(*outputs)
    assert torch.allclose(*gradients, rtol=1e-6, atol=0)  # the estimator multiplies and divides by the scale
    other = WeightFakeQuantize(FakeQuantizeConfig(scheme, MSEObserver(), ClippedSTE(0.25), True), *weight.shape)
    other.observe(weight)
    other(weight).backward(upstream)
    assert torch.equal(learned.log_scale_ratio.grad, other.log_scale_ratio.grad)


def test_learned_scales_with_an_init_by_mse_do_not_shrink_below_what_lsq_finds():
    """Weights fixed: the scale alone goes down the error of the weights, from where a search put it."""
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    quantizer = quantizer_for("w2", weight)
    before = (quantizer(weight) - weight).square().mean().item()
    optimizer = torch.optim.Adam([quantizer.log_scale_ratio], 1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        (quantizer(weight) - weight).square().mean().backward()
        optimizer.step()
    assert (quantizer(weight) - weight).square().mean().item() < 1.05 * before


def test_a_channel_that_is_almost_dead_is_not_thrown_beyond_measure():
    weight = torch.randn(8, 64)
    weight[0] *= 1e-6
    quantizer = quantizer_for("w4", weight)
    quantizer(weight).backward(torch.randn(8, 64))
    gradient = quantizer.log_scale_ratio.grad
    assert gradient[0].abs() < 10 * gradient[1:].abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_a_scale_to_its_type_does_not_round_its_gradient(dtype):
    scale, upstream = torch.tensor([0.1, 0.37], requires_grad=True), torch.tensor([1e9, 1.234567e-12])
    rounded = round_straight_through(scale, dtype)
    assert torch.equal(rounded, round_scale(scale.detach(), dtype))
    rounded.backward(upstream)
    assert torch.equal(scale.grad, upstream)
