"""Counting, dampening and freezing of oscillating weights, against loops over single weights and autograd."""

import itertools

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_qat.core import QuantScheme, dequantize, fake_quantize, quantize
from lightning_qat.nn import prepare
from lightning_qat.nn.oscillation import (
    OscillationState,
    current_codes,
    dampening_gradient,
    hold_frozen,
    holds_values,
)
from lightning_qat.observers import MinMaxObserver

SCHEME = QuantScheme.parse("w4")


def random_walk(num_steps=80, shape=(5, 7), seed=0):
    """Codes that often stay, sometimes move, and sometimes jump."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, shape, generator=generator)
    yield codes.to(torch.int8)
    for _ in range(num_steps):
        moves = torch.randint(-1, 2, shape, generator=generator) * torch.randint(1, 9, shape, generator=generator)
        codes = torch.where(torch.rand(shape, generator=generator) < 0.5, codes, (codes + moves).clamp(-8, 7))
        yield codes.to(torch.int8)


def count_one(codes, momentum):
    """The definition, for the codes of one weight."""
    frequency, mean, last_change = 0.0, float(codes[0]), 0
    for before, after in itertools.pairwise(codes):
        change = after - before
        oscillates = change * last_change < 0
        frequency = momentum * oscillates + (1 - momentum) * frequency
        mean = momentum * after + (1 - momentum) * mean
        last_change = change if change else last_change
        yield frequency, mean, (last_change > 0) - (last_change < 0)


@pytest.mark.parametrize("momentum", [0.01, 0.3])
def test_oscillations_are_counted_as_by_a_loop_over_single_weights(momentum):
    walk = list(random_walk())
    state = OscillationState.begin(walk[0], can_freeze=True)
    expected = [list(count_one(codes.tolist(), momentum)) for codes in torch.stack(walk).flatten(1).T]
    for step, codes in enumerate(walk[1:]):
        state.update(codes, momentum)
        frequencies, means, directions = zip(*(weight[step] for weight in expected), strict=True)
        torch.testing.assert_close(state.frequency.flatten(), torch.tensor(frequencies), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(state.anchor.flatten(), torch.tensor(means), rtol=1e-5, atol=1e-5)
        assert state.directions.flatten().tolist() == list(directions)
        assert torch.equal(state.codes, codes)
    assert (state.frequency > 0.05).any()
    is_over = sum(weight[-1][0] > 0.1 for weight in expected)
    assert state.counts(0.1).tolist() == [is_over, 0]


def test_the_first_change_and_changes_across_the_whole_grid():
    """A code that has not changed yet has no direction to turn back from; int8 differences must not wrap round."""
    state = OscillationState.begin(torch.tensor([[-128, 0]], dtype=torch.int8), can_freeze=False)
    frequencies = []
    for codes in ([127, 1], [-128, 1], [-128, 2], [127, 1]):
        state.update(torch.tensor([codes], dtype=torch.int8), 0.5)
        frequencies.append(state.frequency[0].tolist())
    assert frequencies == [[0, 0], [0.5, 0], [0.25, 0], [0.625, 0.5]]


def test_freezing_takes_the_code_of_the_average_and_keeps_it():
    momentum, threshold = 0.2, 0.5
    walk = list(random_walk())
    state = OscillationState.begin(walk[0], can_freeze=True)
    expected = [list(count_one(codes.tolist(), momentum)) for codes in torch.stack(walk).flatten(1).T]
    first = [next((step for step, row in enumerate(weight) if row[0] > threshold), None) for weight in expected]
    for step, codes in enumerate(walk[1:]):
        state.update(codes, momentum)
        state.freeze(threshold, None, SCHEME)
        is_frozen = [at is not None and at <= step for at in first]
        assert state.frozen.flatten().tolist() == is_frozen
        for index, at in enumerate(first):
            if is_frozen[index]:
                held = round(expected[index][at][1])
                assert state.anchor.flatten()[index] == state.codes.flatten()[index] == held
    assert 0 < sum(is_frozen) < len(is_frozen)
    assert state.counts(0.0)[1] == sum(is_frozen)


def test_what_is_remembered_takes_as_many_bytes_as_is_said():
    codes = torch.zeros(4, 8, dtype=torch.int8)
    for can_freeze, num_bytes in ((False, 6), (True, 11)):
        state = OscillationState.begin(codes, can_freeze)
        assert sum(each.nbytes for each in state.state_dict().values()) == num_bytes * 32
        restored = OscillationState.from_state_dict(state.state_dict(), not can_freeze)
        assert (restored.frozen is None) == can_freeze


# ------------------------------------------------------------------------------------------------- dampening


@pytest.mark.parametrize(
    "scheme",
    ["w4", "w8", "w2g8-nozero", "w3-asym", "w4g8-asym-bf16", "w4-signed_max", "w4-tensor", "w3-qmax", "w4g5-pad", "w1"],
)
def test_the_gradient_of_dampening_is_that_of_autograd(scheme):
    scheme = QuantScheme.parse(scheme)
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    params = MinMaxObserver()(weight / 1.7, scheme)  # so that some weights lie beyond the last level
    codes = quantize(weight, params, scheme)
    low, high = (dequantize(torch.full_like(codes, end), params, scheme).double() for end in scheme.levels()[:2])
    low, high = torch.minimum(low, high), torch.maximum(low, high)
    latent = weight.clone().requires_grad_()
    target = fake_quantize(weight, params, scheme)
    (target - torch.clamp(latent, low, high)).square().sum().backward()
    found = dampening_gradient(weight, params, scheme)
    assert found.dtype == torch.float64
    assert torch.equal(found, latent.grad)
    assert 0 < (found == 0).sum() < found.numel()
    assert dampening_gradient(weight.bfloat16(), params, scheme).dtype == torch.float32


def test_dampening_leads_to_the_middle_of_the_bin():
    scheme = QuantScheme.parse("w4")
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(2))
    params = MinMaxObserver()(weight, scheme)
    middle = fake_quantize(weight, params, scheme)
    is_inside = (weight - middle).abs() <= 0.4999 * params.scale
    is_inside &= (quantize(weight, params, scheme) > -8) & (quantize(weight, params, scheme) < 7)
    for _ in range(60):
        weight -= 0.2 * dampening_gradient(weight, params, scheme)
    torch.testing.assert_close(weight[is_inside], middle[is_inside], rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------------------------------- holding


@pytest.mark.parametrize("options", [{}, {"learn_scales": True}, {"observer": "mse"}], ids=["minmax", "learned", "mse"])
@pytest.mark.parametrize(
    "make",
    [lambda: nn.Linear(16, 6), lambda: nn.Conv2d(4, 6, 2), lambda: Conv1D(6, 16)],
    ids=["linear", "convolution", "transposed"],
)
def test_frozen_weights_are_put_back_to_their_level(make, options):
    model = nn.Sequential(make())
    prepare(model, "w4g8", **options)
    layer = model[0]
    assert holds_values(layer) == (not options)
    quantizer, matrix = layer.weight_fake_quant, layer.to_matrix(layer.weight).detach()
    state = OscillationState.begin(current_codes(layer), can_freeze=True)
    state.frequency[:, ::2] = 0.5
    params = quantizer.qparams(matrix)
    level = dequantize(state.codes, params, quantizer.rung_scheme)
    state.freeze(0.1, params if holds_values(layer) else None, quantizer.rung_scheme)
    moved = matrix * 0.99
    with torch.no_grad():
        layer.weight.mul_(0.99)
        if quantizer.log_scale_ratio is not None:
            quantizer.log_scale_ratio += 0.1
    if not holds_values(layer):
        level = dequantize(state.codes, quantizer.qparams(matrix), quantizer.rung_scheme)
    hold_frozen(layer, state)
    held = layer.to_matrix(layer.weight)
    assert torch.equal(held[:, ::2], level[:, ::2])
    assert torch.equal(held[:, 1::2], moved[:, 1::2])
    if options:
        assert torch.equal(current_codes(layer)[:, ::2], state.codes[:, ::2])
