"""Observers of inputs, against PyTorch's, exact percentiles and a brute-force search."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.ao.quantization import HistogramObserver, MinMaxObserver, MovingAverageMinMaxObserver

from lightning_qat.core import ActivationObserver, QuantScheme, fake_quantize, qparams_from_range
from lightning_qat.core.registry import build, describe
from lightning_qat.observers import (
    ACTIVATION_OBSERVERS,
    EMAObserver,
    HistogramMSEObserver,
    PercentileObserver,
    RunningMinMaxObserver,
)
from lightning_qat.observers.histogram import Histogram

ASYMMETRIC = QuantScheme(8, symmetric=False, granularity="tensor")
SYMMETRIC = QuantScheme(8, granularity="tensor", scale_rule="half_range")


def batches(num_batches=9, size=700, seed=0, relu=False):
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(size, generator=generator) * (1 + index) - 0.3 * index for index in range(num_batches)]
    return [batch.relu() for batch in made] if relu else made


def see(observer, some):
    seen = observer.empty()
    for batch in some:
        seen = observer.update(seen, observer.collect(batch))
    return seen


@pytest.fixture(params=ACTIVATION_OBSERVERS)
def observer(request):
    return ACTIVATION_OBSERVERS[request.param]()


def test_every_observer_keeps_the_protocol_and_can_be_rebuilt(observer):
    assert isinstance(observer, ActivationObserver)
    assert build(describe(observer, ACTIVATION_OBSERVERS), ACTIVATION_OBSERVERS, "activation observer") == observer
    params = observer(see(observer, batches()), ASYMMETRIC)
    assert params.scale.shape == params.zero_point.shape == (1, 1)
    assert params.zero_point == params.zero_point.round()
    assert observer(see(observer, batches()), SYMMETRIC).zero_point is None


def test_nothing_seen_changes_nothing(observer):
    seen, nothing = see(observer, batches()), observer.empty()
    assert torch.equal(observer.update(seen, nothing), seen)
    assert torch.equal(observer.merge(nothing, seen), seen)
    assert torch.equal(observer.update(nothing, seen), seen)
    assert nothing[:2].tolist() == [torch.inf, -torch.inf]


def test_several_calls_in_one_batch_are_as_one_on_all_their_inputs(observer):
    whole = torch.cat(batches())
    merged = observer.empty()
    for batch in batches():
        merged = observer.merge(merged, observer.collect(batch))
    assert torch.equal(merged, observer.collect(whole))


def test_non_negative_inputs_get_the_whole_range_of_codes(observer):
    seen = see(observer, batches(relu=True))
    for bits, qmin in ((8, -128), (4, -8), (2, -2)):
        params = observer(seen, QuantScheme(bits, symmetric=False, granularity="tensor"))
        assert params.zero_point == qmin


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_dtype_and_shape_is_seen_as_its_values(observer, dtype):
    x = torch.randn(3, 4, 5).to(dtype)
    assert torch.equal(observer.collect(x), observer.collect(x.float().flatten()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_without_a_range_show_in_the_range(observer, bad):
    seen = observer.collect(torch.tensor([1.0, bad, -2.0]))
    assert not torch.isfinite(seen[:2]).all()


def test_minmax_is_that_of_pytorch():
    reference = MinMaxObserver()
    for batch in batches():
        reference(batch)
    seen = see(RunningMinMaxObserver(), batches())
    assert seen.tolist() == [reference.min_val, reference.max_val]
    scale, zero_point = reference.calculate_qparams()  # unsigned codes
    params = RunningMinMaxObserver()(seen, ASYMMETRIC)
    assert params.scale.item() == pytest.approx(scale.item(), rel=1e-6)
    assert params.zero_point + 128 == zero_point


@pytest.mark.parametrize("decay", [0.9, 0.5, 0.0])
def test_ema_is_that_of_pytorch(decay):
    reference = MovingAverageMinMaxObserver(averaging_constant=1 - decay)
    for batch in batches():
        reference(batch)
    seen = see(EMAObserver(decay), batches())
    assert torch.allclose(seen, torch.stack([reference.min_val, reference.max_val]), rtol=1e-6)


VALUES = st.floats(-(2.0**20), 2.0**20, width=32).map(lambda value: value if abs(value) > 2**-60 else 0.0)


@given(
    st.lists(st.lists(VALUES, min_size=1, max_size=20), min_size=1, max_size=6),
    st.sampled_from([2, 8, 64]),
)
@settings(deadline=None, max_examples=60)
def test_a_histogram_that_grew_has_exactly_the_counts_of_its_bins(some, num_bins):
    histogram = Histogram(num_bins)
    seen = see(histogram, [torch.tensor(values) for values in some])
    values = np.array([value for batch in some for value in batch], dtype=np.float32).astype(np.float64)
    edges = histogram.edges(seen).double().numpy()
    assert histogram.counts(seen).tolist() == np.histogram(values, edges)[0].tolist()
    assert seen[:2].tolist() == [values.min(), values.max()]
    assert edges[0] <= values.min()
    assert values.max() < edges[-1]


def test_the_powers_of_two_that_scale_a_histogram_are_exact():
    exponents = torch.arange(-100, 128)
    assert torch.exp2(exponents.float()).tolist() == [2.0 ** int(exponent) for exponent in exponents]


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.3, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("relu", [False, True])
def test_percentiles_are_exact_to_within_a_bin(share, relu):
    observer, values = PercentileObserver(num_bins=1024), torch.cat(batches(relu=relu))
    seen = see(observer, batches(relu=relu))
    width = (observer.edges(seen)[1] - observer.edges(seen)[0]).item()
    exact = np.quantile(values.double().numpy(), share, method="inverted_cdf")
    assert abs(observer.quantile(seen, share).item() - exact) <= width


def test_percentile_clips_outliers_and_covers_sparse_inputs():
    x = torch.cat([torch.randn(100_000), torch.tensor([1000.0])])
    observer = PercentileObserver(percentile=99.9)
    params = observer(observer.collect(x), ASYMMETRIC)
    assert params.scale * 255 < 7
    sparse = torch.zeros(100_000)
    sparse[3] = 5.0
    params = observer(observer.collect(sparse), ASYMMETRIC)
    assert params.scale.item() == pytest.approx(5 / 255)


def mean_squared_error(x, low, high, scheme):
    params = qparams_from_range(torch.tensor([[low]]), torch.tensor([[high]]), scheme)
    return (fake_quantize(x, params, scheme) - x).double().square().mean().item()


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kind", ["normal", "heavy", "relu"])
def test_mse_finds_the_best_ratio_of_a_brute_force_search(kind, symmetric, bits):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(40_000, generator=generator)
    x = {"normal": x, "heavy": x**3, "relu": x.relu()}[kind]
    scheme = QuantScheme(bits, symmetric=symmetric, granularity="tensor")
    observer = HistogramMSEObserver()
    params = observer(see(observer, x.chunk(7)), scheme)
    found = (fake_quantize(x, params, scheme) - x).double().square().mean().item()
    low, high = x.min().item(), x.max().item()
    ratios = np.linspace(0.01, 1.0, 397)  # finer than the search, which has 100
    best = min(mean_squared_error(x, low * ratio, high * ratio, scheme) for ratio in ratios)
    assert found <= best * 1.03
    assert found <= mean_squared_error(x, low, high, scheme) * 1.001


@pytest.mark.parametrize("bits", [8, 4])
def test_mse_is_no_worse_than_the_histogram_observer_of_pytorch(bits):
    generator = torch.Generator().manual_seed(1)
    some = [torch.randn(4000, generator=generator) ** 3 for _ in range(5)]
    x = torch.cat(some)
    reference = HistogramObserver(quant_min=0, quant_max=2**bits - 1)
    for batch in some:
        reference(batch)
    scale, zero_point = reference.calculate_qparams()
    quantized = torch.fake_quantize_per_tensor_affine(x, scale.item(), int(zero_point), 0, 2**bits - 1)
    scheme = QuantScheme(bits, symmetric=False, granularity="tensor")
    observer = HistogramMSEObserver()
    ours = fake_quantize(x, observer(see(observer, some), scheme), scheme)
    assert (ours - x).square().mean() <= (quantized - x).square().mean()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "ema", "decay": 1.0}, "0 <= decay < 1"),
        ({"name": "percentile", "percentile": 50}, "above 50 and at most 100"),
        ({"name": "percentile", "num_bins": 7}, "positive, even number"),
        ({"name": "mse", "min_ratio": 0.0}, "min_ratio"),
        ("hist", "There is no activation observer 'hist'"),
    ],
)
def test_bad_arguments_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        build(spec, ACTIVATION_OBSERVERS, "activation observer")


def test_counts_go_beyond_what_float32_can_count_one_by_one():
    x = torch.cat([torch.zeros(2**24 + 1000), torch.ones(3)])
    histogram = Histogram(num_bins=64)
    counts = histogram.counts(histogram.collect(x))
    assert counts.max().item() == 2**24 + 1000
    assert counts.sum().item() == pytest.approx(2**24 + 1003, abs=2)


@pytest.mark.parametrize("name", sorted(ACTIVATION_OBSERVERS))
def test_statistics_are_float32_whatever_the_default_type(name):
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert ACTIVATION_OBSERVERS[name]().empty().dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
