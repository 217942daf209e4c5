"""One contract for every observer of the registry, and each against what it promises."""

import pytest
import torch

from lightning_qat.core import QuantScheme, fake_quantize, group_view
from lightning_qat.observers import OBSERVERS, AbsMeanObserver, MinMaxObserver, MSEObserver

SCHEMES = ["w4", "w2", "w3g16", "w3g24-pad", "w4g16-asym", "w4-tensor", "w2g16-nozero", "w1.58", "w4-signed_max"]


def make_weight(rows=5, columns=48):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))


def squared_error(weight, scheme, params, importance=None):
    error = (fake_quantize(weight, params, scheme) - weight).square()
    error = error if importance is None else error * importance
    return group_view(error, scheme).sum(-1)


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("text", SCHEMES)
def test_contract(name, text):
    observer, scheme, weight = OBSERVERS[name](), QuantScheme.parse(text), make_weight()
    if name == "absmean" and not scheme.symmetric:
        with pytest.raises(ValueError, match="'minmax' or 'mse'"):
            observer(weight, scheme)
        return
    params = observer(weight, scheme)
    expected = (1, 1) if scheme.granularity == "tensor" else (5, scheme.num_groups(48))
    assert params.scale.shape == expected
    assert params.scale.dtype == torch.float32
    assert torch.isfinite(params.scale).all()
    assert (params.scale != 0).all()
    assert (params.zero_point is None) == scheme.symmetric
    # Twice the weight is twice the scale, exactly, and the weight is not touched.
    before = weight.clone()
    assert torch.equal(observer(weight * 2, scheme).scale, params.scale * 2)
    assert torch.equal(weight, before)
    assert observer(weight.requires_grad_(), scheme).scale.grad_fn is None


@pytest.mark.parametrize("text", SCHEMES)
def test_minmax_is_the_range_over_the_divisor(text):
    scheme, weight = QuantScheme.parse(text), make_weight()
    groups = group_view(weight, scheme)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    extent = torch.maximum(-low, high) if scheme.symmetric else high - low
    scale = MinMaxObserver()(weight, scheme).scale
    assert torch.allclose(scale.abs(), extent / scheme.levels().scale_divisor, rtol=1e-6)


@pytest.mark.parametrize("text", SCHEMES)
def test_mse_is_never_worse_than_minmax(text):
    scheme, weight = QuantScheme.parse(text), make_weight()
    best = squared_error(weight, scheme, MSEObserver()(weight, scheme))
    assert (best <= squared_error(weight, scheme, MinMaxObserver()(weight, scheme))).all()


def test_the_minmax_range_is_among_the_candidates():
    scheme, weight = QuantScheme.parse("w8"), make_weight()
    narrow = MSEObserver(num_steps=2, min_ratio=0.2, max_ratio=0.3)
    assert torch.equal(narrow(weight, scheme).scale, MinMaxObserver()(weight, scheme).scale)


@pytest.mark.parametrize("text", ["w4", "w3", "w2", "w2-nozero", "w1.58"])
def test_mse_comes_within_two_percent_of_the_brute_force_optimum(text):
    """An exhaustive float64 search over 20,000 scales, written without the grid."""
    scheme, weight = QuantScheme.parse(text), make_weight(rows=3, columns=64)
    levels = scheme.levels()
    scales = torch.linspace(1e-4, 4.0, 20_000, dtype=torch.float64).view(-1, 1, 1)
    codes = (weight.double() / scales - levels.zero_offset).round().clamp(levels.qmin, levels.qmax)
    errors = ((codes + levels.zero_offset) * scales - weight.double()).square().sum(-1)
    found = squared_error(weight, scheme, MSEObserver()(weight, scheme)).flatten().double()
    assert (found <= errors.amin(0) * 1.02).all()


def test_importance_moves_the_optimum_where_it_matters():
    scheme, weight = QuantScheme.parse("w3"), make_weight()
    importance = torch.ones(48)
    importance[weight.abs().sum(0).argsort()[-8:]] = 100.0
    weighted = MSEObserver()(weight, scheme, importance=importance)
    plain = MSEObserver()(weight, scheme)
    assert (
        squared_error(weight, scheme, weighted, importance) <= squared_error(weight, scheme, plain, importance)
    ).all()
    assert not torch.equal(weighted.scale, plain.scale)


def test_padding_has_no_say_in_the_search():
    """On the grid without a zero, padding zeros have an error; they must not pull the scale down."""
    scheme = QuantScheme.parse("w2g32-nozero-pad")
    weight = make_weight(columns=40)
    padded = MSEObserver()(weight, scheme).scale[:, 1:]
    alone = MSEObserver()(weight[:, 32:], QuantScheme.parse("w2g8-nozero")).scale
    assert torch.equal(padded, alone)


@pytest.mark.parametrize(
    ("text", "outermost"), [("w4", 7), ("w2", 1), ("w1.58", 1), ("w2-nozero", 1.5), ("w3g24-pad", 3)]
)
def test_absmean_is_the_formula_of_lsq(text, outermost):
    scheme, weight = QuantScheme.parse(text), make_weight()
    groups = [weight] if scheme.group_size is None else list(weight.split(scheme.group_size, dim=1))
    expected = torch.stack([2 * group.abs().mean(1) / outermost**0.5 for group in groups], dim=1)
    assert torch.allclose(AbsMeanObserver()(weight, scheme).scale, expected, rtol=1e-6)


def test_absmean_is_the_best_binary_grid():
    scheme, weight = QuantScheme.parse("w1"), make_weight(rows=3, columns=64)
    params = AbsMeanObserver()(weight, scheme)
    found = squared_error(weight, scheme, params).flatten()
    assert torch.allclose(fake_quantize(weight, params, scheme), weight.sign() * weight.abs().mean(1, keepdim=True))
    for alpha in torch.linspace(0.01, 3, 500):
        assert (found <= (weight.sign() * alpha - weight).square().sum(1) + 1e-5).all()


@pytest.mark.parametrize("arguments", [{"num_steps": 0}, {"min_ratio": 0.0}, {"min_ratio": 1.3}])
def test_a_search_that_cannot_work_is_refused(arguments):
    with pytest.raises(ValueError, match="num_steps >= 1"):
        MSEObserver(**arguments)
