"""Methods of quantization after training, each against what its paper says and against brute force."""

import pytest
import torch
from torch.linalg import LinAlgError

from lightning_qat.core import LayerStats, QuantScheme, fake_quantize
from lightning_qat.observers import MinMaxObserver, MSEObserver
from lightning_qat.ptq import AWQ, GPTQ, PTQ_METHODS, RTN, IMatrix, build_methods
from lightning_qat.ptq.cholesky import inverse_factor
from lightning_qat.ptq.engine import quantize_layer
from lightning_qat.ptq.ranges import search_ranges

MINMAX = MinMaxObserver()


def inputs(in_features, num_tokens=512, seed=0, groups=1):
    """Correlated inputs, some features much larger than others, ``[K, N, I]``."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(groups, in_features, in_features, generator=generator)
    x = torch.randn(groups, num_tokens, in_features, generator=generator) @ mixing
    return x * torch.logspace(-1, 1, in_features)[torch.randperm(in_features, generator=generator)]


def stats_of(x, columns_per_channel=1):
    return LayerStats(x.mT @ x, x.abs().mean(1), x.shape[1], columns_per_channel)


def weight_of(out_features, in_features, seed=1):
    return torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed))


SCHEMES = [
    "w4",
    "w3",
    "w2",
    "w8",
    "w2-nozero",
    "w4-asym",
    "w3g16",
    "w4g24-pad-asym",
    "w4-tensor",
    "w2g16-bf16",
    "w1.58",
]


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("text", SCHEMES)
@pytest.mark.parametrize("method", PTQ_METHODS)
def test_every_method_ends_on_the_grid(method, text, groups):
    """Contract: codes in range, shapes right, and an output no worse than that of round-to-nearest."""
    scheme, weight, stats = QuantScheme.parse(text), weight_of(12, 32), stats_of(inputs(32, groups=groups))
    (result,) = PTQ_METHODS[method]()(weight, [scheme], MINMAX, stats)
    levels = scheme.levels()
    assert result.codes.dtype == torch.int8
    assert result.codes.shape == weight.shape
    assert result.codes.min() >= levels.qmin
    assert result.codes.max() <= levels.qmax
    assert result.scheme == scheme
    (baseline,) = RTN()(weight, [scheme], MINMAX)
    assert result.params.scale.shape == baseline.params.scale.shape
    error, reference = (stats.output_error(each.dequantize() - weight) for each in (result, baseline))
    assert error <= reference * 1.02


@pytest.mark.parametrize("method", ["awq", "gptq"])
@pytest.mark.parametrize("text", ["w4", "w3", "w2", "w4g16", "w3-asym", "w2-nozero"])
def test_raw_results_beat_round_to_nearest_on_correlated_inputs(method, text):
    scheme = QuantScheme.parse(text)
    for seed in range(3):
        weight, stats = weight_of(24, 64, seed=seed), stats_of(inputs(64, seed=seed))
        (result,), (baseline,) = (m(weight, [scheme], MINMAX, stats) for m in (PTQ_METHODS[method](), RTN()))
        assert stats.output_error(result.dequantize() - weight) < stats.output_error(baseline.dequantize() - weight)


def brute_force_obq(weight, hessian, scheme, params, order):
    """Optimal brain quantization by its definition: the best update of all weights that are left, in float64."""
    weight, hessian = weight.double().clone(), hessian.double()
    codes = torch.empty_like(weight)
    left = list(order)
    for column in order:
        scale = params.scale.double()[:, column // (scheme.group_size or weight.shape[1])]
        levels = scheme.levels()
        x = weight[:, column] / scale - levels.zero_offset
        code = torch.round(x).clamp(levels.qmin, levels.qmax)
        error = (code + levels.zero_offset) * scale - weight[:, column]
        codes[:, column] = code
        inverse = torch.linalg.inv(hessian[left][:, left])
        at = left.index(column)
        weight[:, left] += error[:, None] * inverse[at] / inverse[at, at]
        left.remove(column)
    return codes


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("block_size", [1, 5, 128])
@pytest.mark.parametrize("text", ["w4", "w3g8", "w2-nozero", "w8g16"])
def test_gptq_is_optimal_brain_quantization(text, block_size, act_order):
    scheme, weight, stats = QuantScheme.parse(text), weight_of(6, 16), stats_of(inputs(16))
    (result,) = GPTQ(block_size=block_size, act_order=act_order)(weight, [scheme], MINMAX, stats)
    diagonal = stats.hessian[0].diagonal()
    damped = stats.hessian[0].double() + 0.01 * diagonal.double().mean() * torch.eye(16, dtype=torch.float64)
    order = torch.argsort(diagonal, descending=True).tolist() if act_order else list(range(16))
    expected = brute_force_obq(weight, damped, scheme, result.params, order)
    assert torch.equal(result.codes.double(), expected)


def test_gptq_of_uncorrelated_inputs_is_round_to_nearest():
    scheme, weight = QuantScheme.parse("w3g8"), weight_of(5, 16)
    stats = LayerStats(torch.diag(torch.rand(16) + 0.1)[None], torch.ones(1, 16), 1)
    (result,), (expected,) = (m(weight, [scheme], MINMAX, stats) for m in (GPTQ(search=None), RTN()))
    assert torch.equal(result.codes, expected.codes)


@pytest.mark.parametrize("method", PTQ_METHODS)
def test_widths_together_are_the_widths_one_by_one(method):
    schemes = [QuantScheme.parse(f"w2g16-{flag}").at(bits) for flag in ("nozero", "bf16") for bits in (8, 4, 3, 2)]
    weight, stats = weight_of(12, 32), stats_of(inputs(32, groups=2))
    together = PTQ_METHODS[method]()(weight, schemes, MINMAX, stats)
    for scheme, result in zip(schemes, together, strict=True):
        (alone,) = PTQ_METHODS[method]()(weight, [scheme], MINMAX, stats)
        assert torch.equal(result.codes, alone.codes)
        assert torch.equal(result.params.scale, alone.params.scale)
        assert result.scheme == scheme


@pytest.mark.parametrize("method", PTQ_METHODS)
def test_groups_of_a_convolution_are_layers_of_their_own(method):
    scheme, weight, x = QuantScheme.parse("w3"), weight_of(12, 16), inputs(16, groups=3)
    (whole,) = PTQ_METHODS[method]()(weight, [scheme], MINMAX, stats_of(x))
    parts = [PTQ_METHODS[method]()(w, [scheme], MINMAX, stats_of(x[k : k + 1])) for k, w in enumerate(weight.chunk(3))]
    if method != "awq":  # which chooses one exponent for the whole layer
        assert torch.equal(whole.codes, torch.cat([part.codes for (part,) in parts]))
    split = torch.cat([part.dequantize() for (part,) in parts])
    stats = stats_of(x)
    assert stats.output_error(split - weight) <= stats.output_error(whole.dequantize() - weight) * 1.001


def test_features_that_are_always_zero_are_rounded_to_nearest():
    x = inputs(16)
    x[:, :, [3, 7]] = 0
    scheme, weight, stats = QuantScheme.parse("w4"), weight_of(8, 16), stats_of(x)
    (expected,) = RTN()(weight, [scheme], MINMAX)
    (result,) = GPTQ(search=None)(weight, [scheme], MINMAX, stats)
    assert torch.equal(result.codes[:, [3, 7]], expected.codes[:, [3, 7]])
    (result,) = AWQ()(weight, [scheme], MINMAX, stats)
    assert torch.isfinite(result.dequantize()).all()


def test_a_layer_without_any_input_signal_is_rounded_to_nearest():
    scheme, weight = QuantScheme.parse("w4"), weight_of(8, 16)
    stats = stats_of(torch.zeros(1, 4, 16))
    for method in PTQ_METHODS.values():
        (result,) = method()(weight, [scheme], MINMAX, stats)
        assert torch.isfinite(result.dequantize()).all()


def test_fewer_tokens_than_features_are_enough():
    scheme, weight, stats = QuantScheme.parse("w4"), weight_of(8, 64), stats_of(inputs(64, num_tokens=3))
    (result,), (baseline,) = (m(weight, [scheme], MINMAX, stats) for m in (GPTQ(), RTN()))
    assert stats.output_error(result.dequantize() - weight) < stats.output_error(baseline.dequantize() - weight)


def test_awq_keeps_what_the_layer_computes():
    scheme, weight, x = QuantScheme.parse("w3"), weight_of(8, 16), inputs(16)
    (result,) = AWQ()(weight, [scheme], MINMAX, stats_of(x))
    assert result.input_scale is not None
    stored = (result.codes.float()) * result.params.scale
    assert torch.allclose((x[0] / result.input_scale) @ stored.T, x[0] @ result.dequantize().T, rtol=1e-4, atol=1e-3)


def test_awq_gives_a_convolution_one_scale_per_channel():
    stats = stats_of(inputs(18), columns_per_channel=9)
    (result,) = AWQ()(weight_of(8, 18), [QuantScheme.parse("w3")], MINMAX, stats)
    assert result.input_scale is not None
    assert torch.equal(result.input_scale.view(2, 9), result.input_scale.view(2, 9)[:, :1].expand(2, 9))


def test_imatrix_weighs_errors_by_the_inputs():
    scheme, weight, stats = QuantScheme.parse("w3"), weight_of(24, 64), stats_of(inputs(64))
    importance = stats.hessian[0].diagonal()
    weighted, plain = (
        (m(weight, [scheme], MSEObserver(), stats)[0].dequantize() - weight).square() @ importance
        for m in (IMatrix(), RTN())
    )
    assert (weighted <= plain).all()
    assert (weighted < plain).any()


# ------------------------------------------------------------------------------------------------------- Cholesky


def test_the_factor_is_that_of_the_inverse():
    hessian = stats_of(inputs(16, groups=2)).hessian
    factor = inverse_factor(hessian, 0.01).double()
    diagonal = torch.diagonal(hessian, dim1=-2, dim2=-1).double().mean(-1)[:, None, None]
    damped = hessian.double() + 0.01 * diagonal * torch.eye(16, dtype=torch.float64)
    assert torch.allclose(factor.mT @ factor @ damped, torch.eye(16, dtype=torch.float64), atol=1e-3)
    assert torch.equal(factor, factor.triu())


def test_a_matrix_that_is_not_positive_is_damped_more_and_then_given_up():
    hessian = torch.eye(4)[None].clone()
    hessian[0, 0, 1] = hessian[0, 1, 0] = 1.05
    assert torch.isfinite(inverse_factor(hessian, 0.01)).all()
    hessian[0, 0, 1] = hessian[0, 1, 0] = 5.0
    with pytest.raises(LinAlgError, match="with 1 damping"):
        inverse_factor(hessian, 0.01)


# --------------------------------------------------------------------------------------------------------- engine


def test_what_is_worse_than_round_to_nearest_is_replaced_and_reported():
    class Spoiled:
        needs_stats = True

        def __call__(self, weight, schemes, observer, stats=None):
            return RTN()(weight * 0.5, schemes, observer)

    weight, stats = weight_of(8, 16), stats_of(inputs(16))
    schemes = [QuantScheme.parse("w4"), QuantScheme.parse("w3")]
    results, reports = quantize_layer(
        "layer", weight, schemes, [4, 3], {"spoiled": Spoiled(), "rtn": RTN()}, MINMAX, stats
    )
    for index in range(2):
        assert torch.equal(results["spoiled"][index].codes, results["rtn"][index].codes)
        assert "worse than that of round-to-nearest" in reports[index].fallback
        assert reports[index].raw_error > reports[index].rtn_error == reports[index].output_error
    assert all(report.fallback is None for report in reports[2:])


def test_a_hessian_that_cannot_be_factorized_is_reported():
    weight, hessian = weight_of(8, 4), torch.eye(4)[None].clone()
    hessian[0, 0, 1] = hessian[0, 1, 0] = 5.0
    stats = LayerStats(hessian, torch.ones(1, 4), 1)
    results, (report,) = quantize_layer(
        "layer", weight, [QuantScheme.parse("w4")], [4], {"gptq": GPTQ()}, MINMAX, stats
    )
    assert "not positive definite" in report.fallback
    assert torch.equal(results["gptq"][0].codes, RTN()(weight, [QuantScheme.parse("w4")], MINMAX)[0].codes)


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ("rtn", ["rtn"]),
        (("rtn", "gptq"), ["rtn", "gptq"]),
        ([{"name": "gptq", "act_order": False}], ["gptq"]),
        ({"with": GPTQ(), "without": {"name": "gptq", "act_order": False}}, ["with", "without"]),
    ],
)
def test_methods_by_name(spec, names):
    assert list(build_methods(spec)) == names


@pytest.mark.parametrize(("spec", "message"), [((), "no methods"), (("rtn", "rtn"), "twice"), ("qptq", "'gptq'")])
def test_bad_methods_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        build_methods(spec)


@pytest.mark.parametrize("text", ["w2", "w3-asym", "w2g16", "w2-tensor"])
def test_a_row_keeps_the_range_whose_output_is_better(text):
    """With inputs of one sign, as after a ReLU, errors add up, and E[x²] alone misjudges what clipping costs."""
    scheme, weight = QuantScheme.parse(text), weight_of(64, 32)
    stats = stats_of(inputs(32).abs() + 5)
    searched = search_ranges(weight, scheme, stats, MSEObserver())
    better = search_ranges(weight, scheme, stats, MSEObserver(), MINMAX)
    errors = [
        stats.row_errors(fake_quantize(weight, params, scheme) - weight)
        for params in (searched, MINMAX(weight, scheme), better)
    ]
    if scheme.granularity == "tensor":
        assert errors[2].sum() == min(errors[0].sum(), errors[1].sum())
        return
    assert (errors[1] < errors[0]).any()
    assert (errors[0] < errors[1]).any()
    assert torch.equal(errors[2], torch.minimum(errors[0], errors[1]))
