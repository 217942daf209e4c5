"""The contract of the grid, for every scheme, and its agreement with torchao."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_qat.core import QuantParams, QuantScheme, dequantize, fake_quantize, group_view, quantize
from lightning_qat.observers import MinMaxObserver, MSEObserver

BITS = [2, 3, 4, 5, 6, 7, 8]
GRANULARITIES = ["-tensor", "", "g16", "g24-pad"]
SCHEMES = [
    f"w{bits}"
    + (granularity if granularity[:1] == "g" else "")
    + flag
    + ("" if granularity[:1] == "g" else granularity)
    for bits, granularity, flag in itertools.product(BITS, GRANULARITIES, ["", "-asym"])
]
SCHEMES += [f"w{bits}{group}" for bits in ("2", "1", "1.58") for group in ("", "g16")]
SCHEMES += ["w2-nozero", "w2g16-nozero", "w4g16-signed_max", "w4g16-qmax", "w4g16-bf16", "w4g16-asym-fp16"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_weight(dtype=torch.float32, rows=6, columns=48):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(3)).to(dtype)


def check_contract(weight, scheme, params):
    levels = scheme.levels()
    codes = quantize(weight, params, scheme)
    restored = dequantize(codes, params, scheme)

    assert codes.dtype == torch.int8
    assert codes.shape == weight.shape
    assert levels.qmin <= codes.min()
    assert codes.max() <= levels.qmax

    fake = fake_quantize(weight, params, scheme)
    assert fake.dtype == weight.dtype
    assert same_bits(fake, restored.to(weight.dtype))
    assert same_bits(fake_quantize(restored, params, scheme), restored)
    assert torch.equal(quantize(restored, params, scheme), codes)

    zero_point = 0.0 if params.zero_point is None else params.zero_point.unsqueeze(-1)
    position = group_view(weight.float(), scheme) / params.scale.unsqueeze(-1) + zero_point - levels.zero_offset
    unclipped = (position >= levels.qmin - 0.5) & (position <= levels.qmax + 0.5)
    error = group_view(restored - weight.float(), scheme).abs()
    half_step = 0.5 * params.scale.abs().unsqueeze(-1)
    largest = torch.maximum(group_view(weight.float(), scheme).abs(), group_view(restored, scheme).abs())
    rounding = 4 * torch.finfo(torch.float32).eps * largest  # of w / s, of q * s and of their difference
    assert ((error <= half_step + rounding) | ~unclipped).all()

    if levels.zero_offset == 0:
        zeros = torch.zeros_like(weight)
        assert torch.equal(fake_quantize(zeros, params, scheme), zeros)


def same_bits(a, b):
    """Equality that tells 0.0 from -0.0."""
    return torch.equal(a, b) and torch.equal(torch.signbit(a), torch.signbit(b))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text", SCHEMES)
@pytest.mark.parametrize("observer", [MinMaxObserver(), MSEObserver(num_steps=7)], ids=["minmax", "mse"])
def test_contract(text, dtype, observer):
    scheme, weight = QuantScheme.parse(text), make_weight(dtype)
    check_contract(weight, scheme, observer(weight, scheme))


@pytest.mark.parametrize("text", [text for text in SCHEMES if "mse" not in text])
def test_minmax_clips_no_weight_by_more_than_a_step(text):
    """At 1 bit and with the widest rules less; what is clipped lies at most one step beyond the last level."""
    scheme, weight = QuantScheme.parse(text), make_weight()
    params = MinMaxObserver()(weight, scheme)
    error = group_view(fake_quantize(weight, params, scheme) - weight, scheme).abs()
    assert (error <= params.scale.abs().unsqueeze(-1) * (1 + 1e-3)).all()


extreme = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**120), max_value=2.0**120)


@settings(max_examples=300, deadline=None)
@given(
    text=st.sampled_from(SCHEMES),
    values=st.lists(extreme, min_size=1, max_size=40),
    rows=st.integers(1, 4),
    data=st.data(),
)
def test_contract_on_any_shape_and_value(text, values, rows, data):
    scheme = QuantScheme.parse(text)
    if scheme.group_size and not scheme.pad_last_group:
        values = values * scheme.group_size
    row = torch.tensor(values)
    weight = torch.stack([row * data.draw(st.sampled_from([0.0, 1.0, -1.0, 1e-3])) for _ in range(rows)])
    if scheme.scale_dtype == "float16":
        weight = weight.clamp(-1e4, 1e4)
    check_contract(weight, scheme, MinMaxObserver()(weight, scheme))


@pytest.mark.parametrize("text", SCHEMES)
@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 5e-39, 3e37])
def test_constant_rows(text, value):
    scheme = QuantScheme.parse(text)
    value = min(value, 1e4) if scheme.scale_dtype == "float16" else value
    weight = torch.full((2, 48), value)
    params = MinMaxObserver()(weight, scheme)
    check_contract(weight, scheme, params)
    if value == 0.0 and scheme.zero_offset == 0.0:
        assert torch.count_nonzero(fake_quantize(weight, params, scheme)) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(bad):
    weight, scheme = make_weight(), QuantScheme.parse("w4")
    params = MinMaxObserver()(weight, scheme)
    weight[1, 2] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize(weight, params, scheme)


def test_a_scale_beyond_its_dtype_is_refused():
    weight, scheme = torch.full((1, 16), 1e6), QuantScheme.parse("w4-fp16")
    with pytest.raises(ValueError, match="beyond the range of float16"):
        quantize(weight, MinMaxObserver()(weight, scheme), scheme)


@pytest.mark.parametrize(("text", "dtype"), [("w4g16-bf16", torch.bfloat16), ("w4g16-fp16", torch.float16)])
def test_scales_are_rounded_before_they_are_used(text, dtype):
    weight, scheme = make_weight(), QuantScheme.parse(text)
    scale = MinMaxObserver()(weight, scheme).scale
    assert torch.equal(scale, scale.to(dtype).float())


def test_signed_max_gives_the_extreme_weight_the_code_qmin():
    weight, scheme = make_weight(), QuantScheme.parse("w4g16-signed_max")
    codes = group_view(quantize(weight, MinMaxObserver()(weight, scheme), scheme), scheme)
    extremes = group_view(weight, scheme).abs().argmax(-1, keepdim=True)
    assert (codes.gather(-1, extremes) == -8).all()


def test_two_bits_without_zero_has_the_four_stated_levels():
    weight, scheme = make_weight(), QuantScheme.parse("w2-nozero")
    largest = weight.abs().amax(1, keepdim=True)
    levels = fake_quantize(weight, MinMaxObserver()(weight, scheme), scheme) / largest
    assert torch.allclose(levels.unique(), levels.new_tensor([-0.75, -0.25, 0.25, 0.75]), atol=1e-6)


# ------------------------------------------------------------------------------------------------- torchao


def torchao_quantize(weight, scheme):
    primitives = pytest.importorskip("torchao.quantization.quant_primitives", reason="torchao is not installed")
    levels = scheme.levels()
    group = scheme.group_size or weight.shape[1]
    block = tuple(weight.shape) if scheme.granularity == "tensor" else (1, group)
    kind = primitives.MappingType.SYMMETRIC if scheme.symmetric else primitives.MappingType.ASYMMETRIC
    scale, zero_point = primitives.choose_qparams_affine(
        weight.float(),
        kind,
        block,
        torch.int8,
        levels.qmin,
        levels.qmax,
        eps=torch.finfo(torch.float32).smallest_normal,
        scale_dtype=torch.float32,
        zero_point_dtype=torch.int32,
    )
    codes = primitives.quantize_affine(weight.float(), block, scale, zero_point, torch.int8, levels.qmin, levels.qmax)
    restored = primitives.dequantize_affine(
        codes, block, scale, zero_point, torch.int8, levels.qmin, levels.qmax, output_dtype=torch.float32
    )
    return scale, zero_point, codes, restored


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("granularity", ["-tensor", "", "g32"])
@pytest.mark.parametrize("kind", ["", "-asym"])
@pytest.mark.parametrize("bits", BITS)
def test_no_code_differs_from_torchao(bits, kind, granularity, dtype):
    scheme = QuantScheme.parse(f"w{bits}{granularity}{kind}")
    weight = make_weight(dtype, rows=256, columns=512)
    weight[0] = 0
    weight[1] = weight[1].abs()  # one-sided: the range is widened to hold 0
    params = MinMaxObserver()(weight, scheme)
    scale, zero_point, codes, restored = torchao_quantize(weight, scheme)
    ours = quantize(weight, params, scheme)
    assert torch.equal(params.scale.flatten(), scale.flatten())
    if params.zero_point is not None:
        assert torch.equal(params.zero_point.flatten(), zero_point.flatten().float())
    assert int((ours != codes).sum()) == 0
    assert torch.equal(dequantize(ours, params, scheme), restored)


def test_codes_do_not_depend_on_the_dtype_of_equal_weights():
    scheme, weight = QuantScheme.parse("w4g16"), make_weight(torch.bfloat16)
    params = MinMaxObserver()(weight, scheme)
    assert torch.equal(quantize(weight, params, scheme), quantize(weight.float(), params, scheme))


def test_params_can_be_given_by_hand():
    scheme = QuantScheme(num_bits=3, symmetric=False)
    params = QuantParams(torch.tensor([[0.5]]), torch.tensor([[-1.0]]))
    codes = quantize(torch.tensor([[-2.0, 0.0, 0.26, 9.0]]), params, scheme)
    assert codes.tolist() == [[-4, -1, 0, 3]]
    assert dequantize(codes, params, scheme).tolist() == [[-1.5, 0.0, 0.5, 2.0]]
