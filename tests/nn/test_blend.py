"""Weights that are fake-quantized in part."""

import copy

import pytest
import torch
from torch import nn

from lightning_qat import prepare, quantized_weights
from lightning_qat.nn import set_num_bits


def make(scheme="w2g16", dtype=torch.float32, **options):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(32, 12)).to(dtype)
    prepare(model, scheme, **options)
    return model, model[0].weight_fake_quant


@pytest.mark.parametrize("scheme", ["w2g16", "w4", "w3-asym", "w2-nozero"])
@pytest.mark.parametrize("blend", [0.0, 0.25, 0.9])
def test_value_and_gradient_are_the_closed_form(scheme, blend):
    """d/dw = (1 - x) + x * d fq/dw, and d/ds = x * d fq/ds."""
    model, quantizer = make(scheme, learn_scales=True)
    weight = (model[0].weight.detach() * 3).requires_grad_()  # some are clipped
    quantizer.observe(model[0].weight)
    cotangent = torch.randn(12, 32)
    inputs = (weight, quantizer.log_scale_ratio)
    quantized = quantizer(weight)
    in_weight, in_scale = (grad.double() for grad in torch.autograd.grad(quantized, inputs, cotangent))
    quantizer.set_blend(blend)
    blended = quantizer(weight)
    found = torch.autograd.grad(blended, inputs, cotangent)
    expected = (1 - blend) * weight.double() + blend * quantized.double()
    assert torch.allclose(blended.double(), expected, rtol=1e-6, atol=1e-8)
    assert torch.allclose(found[0].double(), (1 - blend) * cotangent.double() + blend * in_weight, rtol=1e-5, atol=1e-6)
    rounding = 32 * 2**-24 * in_scale.abs().max().item()  # of a sum of 32 terms in float32
    assert torch.allclose(found[1].double(), blend * in_scale, rtol=0, atol=rounding)
    assert in_weight.eq(0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_both_ends_are_exact(dtype):
    model, quantizer = make(dtype=dtype)
    with torch.no_grad():
        model[0].weight[0, 0] = -0.0
        model[0].weight[1, 1] = torch.finfo(dtype).max
    quantized = quantizer(model[0].weight)
    quantizer.set_blend(0.0)
    assert torch.equal(quantizer(model[0].weight), model[0].weight)
    quantizer.set_blend(1.0)
    found = quantizer(model[0].weight)
    assert found.dtype == dtype
    assert torch.equal(found.view(torch.uint8), quantized.view(torch.uint8))  # signs of zeros, too


def test_blending_compiles_nothing_anew_and_is_exact_at_the_end():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model, quantizer = make("w2g16", learn_scales=True)
    counter, x = CompileCounter(), torch.randn(4, 32)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for bits, blend in ((8, 0.0), (8, 0.3), (4, 0.6), (2, 1.0), (16, 0.5)):
        set_num_bits(model, bits)
        quantizer.set_blend(blend)
        quantizer.observe(model[0].weight)  # as a run does when a rung begins
        assert torch.equal(compiled(x), model(x))
    assert counter.frame_count == 1


def test_codes_are_those_of_the_whole_weight():
    model, quantizer = make("w3g16")
    expected = quantized_weights(model)["0"]
    quantizer.set_blend(0.5)
    assert torch.equal(quantized_weights(model)["0"].codes, expected.codes)
    assert "blended in by 0.5" in repr(model)


def test_the_share_travels_with_the_state_and_older_states_have_none():
    model, quantizer = make()
    quantizer.set_blend(0.25)
    other, found = make()
    other.load_state_dict(model.state_dict())
    x = torch.randn(3, 32)
    assert found.blend == 0.25
    assert torch.equal(other(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    state = quantizer.get_extra_state()
    del state["blend"]
    found.set_extra_state(state)
    assert found.blend == 1.0


def test_the_share_survives_a_move_and_a_change_of_dtype():
    model, quantizer = make()
    quantizer.set_blend(0.3)
    expected = model[0].weight.detach().bfloat16()
    model.bfloat16()
    blended = quantizer(expected)
    quantizer.set_blend(1.0)
    quantized = quantizer(expected)
    exact = torch.lerp(expected.float(), quantized.float(), torch.tensor(0.3)).bfloat16()
    assert torch.equal(blended, exact)


def test_an_input_is_quantized_in_full():
    model, quantizer = make("w4a4")
    x = torch.randn(5, 32)
    expected = model[0].input_fake_quant(x)
    quantizer.set_blend(0.0)
    assert torch.equal(model[0].input_fake_quant(x), expected)
    assert torch.equal(model(x), nn.functional.linear(expected, model[0].weight, model[0].bias))
