"""Bits along a line and along a cosine."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_qat.core import WIDTHS
from lightning_qat.schedules import SCHEDULES, Cosine, Linear, read_schedule

CURVES = {
    Linear: lambda share: share,
    Cosine: lambda share: (1 - math.cos(math.pi * share)) / 2,
}
EPSILON = 1e-6


def bits_at(rungs, step):
    return [bits for first, bits in rungs if first <= step][-1]


def rounded_up(height):
    return min(width for width in WIDTHS if width >= height - EPSILON)


@st.composite
def ramps(draw):
    high, low = sorted(draw(st.lists(st.sampled_from(WIDTHS), min_size=2, max_size=2)), reverse=True)
    total = draw(st.integers(1, 400))
    start = draw(st.integers(0, total - 1))
    end = draw(st.integers(start, total - 1))
    return draw(st.sampled_from([Linear, Cosine]))(low, start_bits=high, end=end), start, end, total


@given(ramps())
def test_each_step_has_the_width_of_the_curve_rounded_up(case):
    schedule, start, end, total = case
    rungs = schedule.rungs(start, total)
    high, low = schedule.start_bits, schedule.final_bits
    for step in range(start, total):
        share = (step - start) / (end - start) if step < end else 1.0
        height = high - (high - low) * CURVES[type(schedule)](share)
        bits = bits_at(rungs, step)
        # On a whole width the curve may be a rounding error above or below.
        assert bits in (rounded_up(height), rounded_up(height - 2 * EPSILON)), (step, height)


@given(ramps())
def test_ramps_go_down_and_are_at_the_final_width_from_their_end(case):
    schedule, start, end, total = case
    rungs = schedule.rungs(start, total)
    steps, widths = zip(*rungs, strict=True)
    assert steps[0] == start
    assert list(steps) == sorted(set(steps))
    assert list(widths) == sorted(set(widths), reverse=True)
    if schedule.start_bits > schedule.final_bits:
        assert rungs[-1] == (end, schedule.final_bits)
    assert bits_at(rungs, start) == (schedule.final_bits if end == start else schedule.start_bits)


@given(
    cls=st.sampled_from([Linear, Cosine]),
    end=st.floats(0.001, 0.999),
    final=st.sampled_from([1, 1.58, 2, 4]),
    total=st.integers(1, 5000),
)
def test_the_final_width_is_reached_on_the_shortest_run(cls, end, final, total):
    rungs = cls(final, end=end).rungs(0, total)
    assert rungs[-1] == (math.floor(Fraction(repr(end)) * total), final)
    assert rungs[-1][0] < total


def test_a_cosine_stays_longer_near_both_ends():
    line, cosine = Linear(2, end=600).rungs(0, 1000), Cosine(2, end=600).rungs(0, 1000)
    assert line == [(0, 8), (100, 7), (200, 6), (300, 5), (400, 4), (500, 3), (600, 2)]
    expected = [(0, 8), *((math.ceil(600 * math.acos(h / 3) / math.pi), 5 + h) for h in (2, 1)), (300, 5)]
    assert cosine[:4] == expected
    mirrored = [(600 - step, 10 - bits) for step, bits in cosine]
    assert all(abs(a[0] - b[0]) <= 100 for a, b in zip(sorted(mirrored), cosine, strict=True))


def test_widths_below_two_bits_are_gone_through():
    assert [bits for _, bits in Linear(1, end=700).rungs(0, 1000)] == [8, 7, 6, 5, 4, 3, 2, 1.58, 1]
    assert Linear(1, end=700).rungs(0, 1000)[-2] == (math.ceil(700 * 6.42 / 7), 1.58)


def test_the_default_leaves_half_of_the_run_to_the_final_width():
    assert read_schedule("linear", SCHEDULES, 2) == Linear(2, start_bits=8, end=0.5)
    assert read_schedule({"name": "cosine", "end": 10}, SCHEDULES, 2) == Cosine(2, end=10)
    assert Linear(2).rungs(0, 1000)[-1] == (500, 2)


@pytest.mark.parametrize("cls", [Linear, Cosine])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"final_bits": 8, "start_bits": 4}, "must go down, but start_bits=4 is less than final_bits=8"),
        ({"final_bits": 9}, "9 is not a width"),
        ({"final_bits": 4, "start_bits": 7.5}, "7.5 is not a width"),
        ({"final_bits": 4, "end": 1.0}, "training ends before 1.0 is reached"),
        ({"final_bits": 4, "end": -3}, "cannot be negative"),
        ({"final_bits": 4, "end": "0.5"}, "must be a number of optimizer steps"),
    ],
)
def test_bad_ramps_are_refused(cls, arguments, message):
    with pytest.raises(ValueError, match=message):
        cls(**arguments)


def test_ramps_that_do_not_fit_the_run_are_refused():
    with pytest.raises(ValueError, match="reached at step 40, but the run has only 40"):
        Linear(2, end=40).rungs(0, 40)
    with pytest.raises(ValueError, match="2 bits at step 10, but fake quantization starts only after step 11"):
        Linear(2, end=10).rungs(11, 40)
