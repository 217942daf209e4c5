import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_qat.core import Schedule
from lightning_qat.schedules import SCHEDULES, Constant, Cosine, Linear, Plateau, Staggered, Staircase
from lightning_qat.schedules.open_loop import position_to_step

EXAMPLES = {
    "constant": Constant(4),
    "cosine": Cosine(2),
    "linear": Linear(3, start_bits=6, end=0.8),
    "linear from a pass-through, by step": Linear(1, start_bits=16, end=30),
    "plateau": Plateau([8, 4, 2]),
    "plateau by step": Plateau([8, 4, 2], end=20),
    "staggered": Staggered(weights=[4], activations={0.0: 16, 0.3: 4}),
    "staircase": Staircase([8, 4, 3, 2]),
    "staircase by fraction": Staircase({0.0: 8, 0.25: 4, 0.5: 3}),
    "staircase by step": Staircase({0: 16, 3: 8, 10: 1.58}),
}


def test_every_schedule_has_an_example():
    assert {type(schedule) for schedule in EXAMPLES.values()} == set(SCHEDULES.values())


@pytest.mark.parametrize("name", EXAMPLES)
def test_contract(name):
    schedule = EXAMPLES[name]
    assert isinstance(schedule, Schedule)
    rungs = schedule.rungs(0, 40)
    assert rungs[0][0] == 0
    assert rungs[-1][1] == schedule.final_bits
    assert rungs == sorted(rungs)
    assert [bits for _, bits in rungs] == sorted((bits for _, bits in rungs), reverse=True)
    assert schedule.update({"val/loss": 1.0}, step=5, start=0, total_steps=40) is None
    schedule.load_state_dict(schedule.state_dict())
    assert schedule.rungs(0, 40) == rungs
    assert not schedule.may_go_back(1, 0, 40)
    inputs = schedule.activation_rungs(0, 40)
    assert inputs is None or inputs[-1][1] >= schedule.final_bits


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_endless_run_needs_positions_in_steps(name):
    schedule = EXAMPLES[name]
    if schedule.is_fractional:
        with pytest.raises(ValueError, match=r"no known end|with a known end"):
            schedule.rungs(0, None), schedule.activation_rungs(0, None)
    else:
        assert schedule.rungs(0, None) == schedule.rungs(0, 40)


widths = st.lists(st.sampled_from([16, 8, 6, 5, 4, 3, 2, 1.58, 1]), min_size=1, unique=True).map(
    lambda bits: sorted(bits, reverse=True)
)


@given(bits=widths, total=st.integers(1, 500), start=st.integers(0, 499))
def test_the_last_rung_is_reached_on_every_run(bits, total, start):
    start = min(start, total - 1)
    rungs = Staircase(bits).rungs(start, total)
    steps = [step for step, _ in rungs]
    assert rungs[-1][1] == bits[-1]
    assert steps[0] == start
    assert steps[-1] < total
    assert steps == sorted(set(steps))


@given(fractions=st.lists(st.floats(0.001, 0.999), min_size=1, max_size=5, unique=True), total=st.integers(1, 10_000))
def test_fractions_are_reached_on_every_run(fractions, total):
    positions = dict(zip([0.0, *sorted(fractions)], [8, 6, 5, 4, 3, 2], strict=False))
    rungs = Staircase(positions).rungs(0, total)
    assert rungs[-1][1] == list(positions.values())[-1]
    assert rungs[-1][0] < total


def test_equal_shares_start_after_the_delay():
    assert Staircase([8, 4, 3, 2]).rungs(100, 500) == [(100, 8), (200, 4), (300, 3), (400, 2)]


def test_fractions_are_taken_as_written():
    assert 0.29 * 100 < 29
    assert position_to_step(0.29, 100) == 29
    assert position_to_step(17, None) == 17


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        ([], "schedule is empty"),
        ([4, 8], "must go down"),
        ([4, 4], "must go down"),
        ({0.1: 8, 0.5: 4}, "must begin at 0"),
        ({0.0: 8, 1.0: 4}, "training ends before 1.0 is reached"),
        ({0: 8, 0.5: 4, 100: 2}, "mix optimizer steps"),
        ({0: 4, -5: 8}, "cannot be negative"),
    ],
)
def test_bad_staircases_are_refused(bits, message):
    with pytest.raises(ValueError, match=message):
        Staircase(bits)


def test_a_rung_beyond_the_end_is_refused():
    with pytest.raises(ValueError, match=r"last rung \(2 bits\) begins at step 50, but the run has only 40"):
        Staircase({0: 8, 50: 2}).rungs(0, 40)


def test_a_start_after_a_rung_is_refused():
    with pytest.raises(ValueError, match="rung of 4 bits begins at step 10, but fake quantization starts only after"):
        Staircase({0: 8, 10: 4, 20: 3}).rungs(15, 40)


def test_a_start_on_a_rung_skips_the_one_before():
    assert Staircase({0.0: 8, 0.35: 4}).rungs(1, 5) == [(1, 4)]


def test_shares_of_an_endless_run_are_refused():
    with pytest.raises(ValueError, match="known end"):
        Staircase([8, 4]).rungs(0, None)
    with pytest.raises(ValueError, match="no known end"):
        Staircase({0.0: 8, 0.5: 4}).rungs(0, None)
    assert Staircase({0: 8, 5: 4}).rungs(0, None) == [(0, 8), (5, 4)]
