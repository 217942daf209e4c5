"""The gradients of learned input grids, against closed forms in float64."""

import pytest
import torch

from lightning_qat.core import Levels, QuantParams, QuantScheme, fake_quantize
from lightning_qat.estimators import ClippedSTE
from lightning_qat.estimators.lsq_plus import LearnedBounds, fake_quantize_learned, learned_zero_point


def closed_form(x, scale, zero_point, levels, gradient):
    """Return output and gradients of LSQ and LSQ+ as in the papers, value by value, float64."""
    qmin, qmax, offset, _ = levels
    low, high = qmin - zero_point, qmax - zero_point
    output, of_x = torch.empty_like(x), torch.empty_like(x)
    of_scale = of_zero_point = 0.0
    for index, value in enumerate(x.tolist()):
        v = value / scale - offset
        if v < low or v > high:
            steps = low if v < low else high
            of_x[index] = 0.0
            of_scale += gradient[index].item() * (steps + offset)
            of_zero_point += gradient[index].item() * -scale
        else:
            steps = round(v)  # Python rounds half to even
            of_x[index] = gradient[index]
            of_scale += gradient[index].item() * (steps - v)
        output[index] = (steps + offset) * scale
    return output, of_x, of_scale, of_zero_point


SCHEMES = {
    "8 bits": (QuantScheme(8, symmetric=False, granularity="tensor"), 0.02, -100.0),
    "4 bits": (QuantScheme(4, symmetric=False, granularity="tensor"), 0.3, 2.0),
    "2 bits, unsigned": (QuantScheme(2, symmetric=False, granularity="tensor"), 0.5, -2.0),
    "symmetric": (QuantScheme(4, granularity="tensor"), 0.2, 0.0),
    "without zero": (QuantScheme(2, granularity="tensor", zero_offset=0.5), 0.6, 0.0),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_gradients_are_the_closed_forms_in_float64(name):
    scheme, s, z = SCHEMES[name]
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(300, generator=generator, dtype=torch.float64) * 2
    gradient = torch.randn(300, generator=generator, dtype=torch.float64)
    expected = closed_form(x, s, z, scheme.levels(), gradient)

    def leaves():
        values = (x, torch.tensor([s], dtype=torch.float64), torch.tensor([z], dtype=torch.float64))
        return [value.clone().requires_grad_() for value in values]

    def fused(x, scale, zero_point):
        return fake_quantize_learned(x, scale, zero_point, scheme.levels())

    def composed(x, scale, zero_point):
        qmin, qmax, offset, _ = scheme.levels()
        rounding = LearnedBounds(ClippedSTE())
        return (rounding(x / scale - offset, qmin - zero_point, qmax - zero_point) + offset) * scale

    for quantize in (fused, composed):
        own, scale, zero_point = leaves()
        output = quantize(own, scale, zero_point)
        output.backward(gradient)
        assert torch.allclose(output, expected[0], rtol=0, atol=1e-12)
        assert torch.allclose(own.grad, expected[1], rtol=1e-12, atol=0)
        assert scale.grad.item() == pytest.approx(expected[2], rel=1e-9)
        assert zero_point.grad.item() == pytest.approx(expected[3], rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SCHEMES)
def test_the_fused_form_gives_the_levels_of_the_one_grid_to_the_bit(name, dtype):
    scheme, s, z = SCHEMES[name]
    x = (torch.randn(2, 3, 500) * 2).to(dtype)
    params = QuantParams(torch.tensor([[s]]), None if scheme.symmetric else torch.tensor([[z]]))
    fused = fake_quantize_learned(x, torch.tensor([s]).view(1, 1, 1), z, scheme.levels())
    assert fused.dtype == dtype
    assert torch.equal(fused, fake_quantize(x, params, scheme, rounding=LearnedBounds(ClippedSTE())))
    assert torch.equal(fused, fake_quantize(x, params, scheme))


def test_zeros_after_a_relu_do_not_move_the_zero_point():
    x = torch.tensor([0.0, 0.0, 0.0, 1.0])
    zero_point = torch.tensor([-8.0], requires_grad=True)
    levels = QuantScheme(4, symmetric=False, granularity="tensor").levels()
    fake_quantize_learned(x, torch.tensor([0.1]), zero_point, levels).sum().backward()
    assert zero_point.grad == 0


def test_the_zero_point_is_a_code_and_its_gradient_leads_back_inside():
    qmin, qmax, one = torch.tensor(-8.0), torch.tensor(7.0), torch.ones(())
    levels = Levels(qmin, qmax, torch.tensor(0.0), torch.tensor(15.0))
    for start, offset, direction, passes in (
        (0.0, 0.1, 1.0, True),
        (-8.0, -0.1, 1.0, False),  # below the codes, and descent would lead further down
        (-8.0, -0.1, -1.0, True),
        (7.0, 0.1, -1.0, False),
        (7.0, 0.1, 1.0, True),
    ):
        parameter = torch.tensor([offset], requires_grad=True)
        zero_point = learned_zero_point(torch.tensor([start]), parameter, levels.qmin, levels.qmax, one)
        assert zero_point == min(max(round(start + 15 * offset), -8), 7)
        (zero_point * direction).backward()
        assert parameter.grad == (15 * direction if passes else 0)


def test_a_step_of_sgd_moves_the_offset_as_in_lsq_plus():
    """LSQ+ learns beta = -z * s with the gradient scale g."""
    s, z, g, lr = 0.25, 1.0, 0.01, 0.5
    x, gradient = torch.tensor([3.0, -4.0, 0.3]), torch.tensor([0.7, 0.4, -0.2])
    levels = Levels(*(torch.tensor(float(each)) for each in QuantScheme(4, symmetric=False).levels()))
    parameter = torch.zeros(1, requires_grad=True)
    factor = torch.tensor(g / (s * 15) ** 2)
    zero_point = learned_zero_point(torch.tensor([z]), parameter, levels.qmin, levels.qmax, factor)
    fake_quantize_learned(x, torch.tensor([s]), zero_point, levels).backward(gradient)
    moved = z - lr * 15 * parameter.grad.item()
    of_beta = 0.7 + 0.4  # of the values outside
    assert -moved * s == pytest.approx(-z * s - lr * g * of_beta)
