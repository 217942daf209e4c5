"""Gradients against closed forms in float64."""

import pytest
import torch

from lightning_qat.core import QuantParams, QuantScheme, fake_quantize, group_view, hard_round
from lightning_qat.estimators import ESTIMATORS, ClippedSTE
from lightning_qat.observers import MinMaxObserver

SCHEMES = ["w4", "w2", "w3g16", "w4g16-asym", "w4-tensor", "w2g16-nozero", "w4g24-pad"]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_forward_is_the_hard_rounding(name):
    x = torch.linspace(-20, 20, 4001)
    estimator = ESTIMATORS[name]()
    assert torch.equal(estimator(x, -8, 7), hard_round(x, -8, 7))
    low, high = torch.full((4001,), -3.0), torch.full((4001,), 2.0)
    assert torch.equal(estimator(x, low, high), hard_round(x, low, high))


def position(weight, scheme, params):
    """``w / s`` in units of codes, in float64."""
    zero_point = 0.0 if params.zero_point is None else params.zero_point.double().unsqueeze(-1)
    x = group_view(weight.double(), scheme) / params.scale.double().unsqueeze(-1)
    return x + zero_point - scheme.levels().zero_offset


def check(weight, scheme, params, margin):
    """Compare the gradient of ``sum(upstream * fake_quantize(w))`` with ``upstream * [qmin-m < x < qmax+m]``."""
    levels = scheme.levels()
    upstream = torch.randn_like(weight)
    weight.requires_grad_()
    fake_quantize(weight, params, scheme, rounding=ClippedSTE(margin)).backward(upstream)
    x = position(weight.detach(), scheme, params)
    inside = (x > levels.qmin - margin) & (x < levels.qmax + margin)
    inside = inside.reshape(weight.shape[0], -1)[:, : weight.shape[1]] if scheme.granularity != "tensor" else inside
    expected = upstream.double() * inside.reshape(weight.shape)
    assert torch.allclose(weight.grad.double(), expected, rtol=1e-6, atol=0)
    return inside


@pytest.mark.parametrize("text", SCHEMES)
@pytest.mark.parametrize("margin", [0.0, 1.0])
def test_weight_gradient_is_clipped_where_stated(text, margin):
    scheme, weight = QuantScheme.parse(text), torch.randn(6, 48)
    params = MinMaxObserver()(weight, scheme)
    narrow = QuantParams(params.scale * 0.6, params.zero_point)
    inside = check(weight, scheme, narrow, margin)
    assert 0 < inside.float().mean() < 1  # the test sees both sides


@pytest.mark.parametrize("text", ["w4", "w3g16", "w2", "w2g16-nozero", "w4-tensor"])
def test_every_weight_of_a_minmax_grid_gets_its_gradient(text):
    scheme, weight = QuantScheme.parse(text), torch.randn(64, 48)
    assert check(weight, scheme, MinMaxObserver()(weight, scheme), margin=1.0).all()


@pytest.mark.parametrize("text", ["w4", "w2g16-nozero", "w3g16"])
def test_scale_gradient_is_that_of_lsq(text):
    """``d w_hat / d s`` is ``w_hat / s - w / s`` inside and ``w_hat / s`` outside (arXiv:1902.08153, eq. 3)."""
    scheme, weight = QuantScheme.parse(text), torch.randn(6, 48)
    scale = (MinMaxObserver()(weight, scheme).scale * 0.6).requires_grad_()
    upstream = torch.randn_like(weight)
    fake_quantize(weight, QuantParams(scale), scheme, rounding=ClippedSTE(margin=0.0)).backward(upstream)
    levels = scheme.levels()
    x = position(weight, scheme, QuantParams(scale.detach()))
    code = x.round().clamp(levels.qmin, levels.qmax)
    inside = (x > levels.qmin) & (x < levels.qmax)
    per_weight = code + levels.zero_offset - torch.where(inside, x + levels.zero_offset, 0.0)
    expected = (per_weight * group_view(upstream.double(), scheme)).sum(-1)
    assert torch.allclose(scale.grad.double(), expected, rtol=1e-4, atol=1e-5)


def test_gradient_keeps_the_dtype_of_the_weight():
    scheme, weight = QuantScheme.parse("w4"), torch.randn(2, 16).bfloat16().requires_grad_()
    fake_quantize(weight, MinMaxObserver()(weight, scheme), scheme, rounding=ClippedSTE()).sum().backward()
    assert weight.grad.dtype == torch.bfloat16
    assert (weight.grad == 1).all()
