"""The schedule that follows a metric."""

import copy
import json
import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_qat.schedules import Plateau


def feed(schedule, losses, every=10, start=0, total=1000, first=0):
    """Validate after every ``every`` steps, and return what was decided by step."""
    decided = {}
    for number, loss in enumerate(losses, start=1):
        step = first + number * every
        if message := schedule.update({"val/loss": loss}, step, start, total):
            decided[step] = message
    return decided


def test_without_decisions_the_rungs_share_the_time_until_the_end():
    assert Plateau([8, 4, 3, 2]).rungs(0, 1200) == [(0, 8), (200, 4), (400, 3), (600, 2)]
    assert Plateau([8, 4, 2], end=100).rungs(20, 1000) == [(20, 8), (60, 4), (100, 2)]
    assert Plateau([8, 4, 2], end=None).rungs(20, None) == [(20, 8)]
    assert Plateau([4]).rungs(5, None) == [(5, 4)]


def test_it_goes_down_after_patience_without_improvement():
    schedule = Plateau([8, 4, 2], patience=2, end=None)
    decided = feed(schedule, [3.0, 2.0, 2.5, 2.0])
    assert decided == {40: "val/loss has not improved for 2 validations: 4 bits from step 40"}
    assert schedule.rungs(0, None) == [(0, 8), (40, 4)]


def test_every_rung_has_a_best_of_its_own():
    schedule = Plateau([8, 4, 2], patience=2, end=None)
    feed(schedule, [1.0, 1.0, 1.0])
    assert schedule.rungs(0, None) == [(0, 8), (30, 4)]
    assert feed(schedule, [1.8, 1.7, 1.6, 1.5, 1.6], first=30) == {}  # worse than on the rung before, and improving
    feed(schedule, [1.55], first=80)
    assert schedule.rungs(0, None)[-1] == (90, 2)
    feed(schedule, [1.9] * 10, first=90)  # nothing is left to go to
    assert schedule.rungs(0, None)[-1] == (90, 2)


def test_an_improvement_must_exceed_min_delta():
    assert feed(Plateau([8, 4], patience=1, min_delta=0.1), [1.0, 0.85, 0.8]) != {}
    assert feed(Plateau([8, 4], patience=1, min_delta=0.1), [1.0, 0.85, 0.7]) == {}
    assert feed(Plateau([8, 4], patience=1, mode="max"), [0.5, 0.6, 0.7]) == {}
    assert list(feed(Plateau([8, 4], patience=1, mode="max"), [0.5, 0.6, 0.6])) == [30]


def test_a_rung_that_is_left_early_leaves_its_time_to_the_others():
    schedule = Plateau([8, 4, 2], patience=1, end=0.5)
    assert schedule.rungs(0, 1000) == [(0, 8), (250, 4), (500, 2)]
    feed(schedule, [1.0, 1.0], every=50)
    assert schedule.rungs(0, 1000) == [(0, 8), (100, 4), (500, 2)]


def test_a_rung_whose_time_is_up_is_left_without_a_decision():
    schedule = Plateau([8, 4, 2], patience=2, end=0.5)
    feed(schedule, [1.0 - 0.001 * n for n in range(30)], every=10)  # improves all the time, over step 250
    assert schedule.rungs(0, 1000) == [(0, 8), (250, 4), (500, 2)]
    feed(schedule, [2.0, 2.0], first=300)
    assert schedule.rungs(0, 1000) == [(0, 8), (250, 4), (320, 2)]


def went_back(**options):
    schedule = Plateau([8, 4, 2], patience=1, **options)
    feed(schedule, [1.0, 1.0])
    return schedule


@pytest.mark.parametrize("loss", [2.1, math.nan, math.inf])
def test_it_goes_back_up_if_the_metric_diverges(loss):
    schedule = went_back()
    decided = feed(schedule, [loss], first=20)
    assert f"val/loss is {loss:g} (before: 1) after going to 4 bits: back to 8 bits from step 30" in decided[30]
    assert schedule.rungs(0, 1000) == [(0, 8), (20, 4), (30, 8), (265, 4), (500, 2)]


@pytest.mark.parametrize("losses", [[1.9], [1.5, 1.4, 5.0]])
def test_it_stays_if_the_metric_is_worse_by_less_or_later(losses):
    schedule = went_back(trial=2)
    feed(schedule, losses, first=20)
    assert schedule.rungs(0, 1000)[:2] == [(0, 8), (20, 4)]
    assert all(bits != 8 for _, bits in schedule.rungs(0, 1000)[1:])


@pytest.mark.parametrize(
    ("mode", "best", "kept", "diverged"),
    [
        ("min", 1.0, 2.0, 2.01),
        ("max", 0.8, 0.4, 0.39),
        ("min", -4.0, -2.0, -1.9),  # a log-likelihood, negated
        ("max", -4.0, -8.0, -8.1),
        ("min", 0.0, 0.0, 0.1),
        ("min", 0.0, 1e-9, 1e-3),
        ("min", -1e-9, 1e-9, 1e-3),
        ("max", 0.0, -1e-9, -1e-3),
    ],
)
def test_divergence_is_a_factor_whatever_the_sign(mode, best, kept, diverged):
    for value, expected in ((kept, 4), (diverged, 8)):
        schedule = Plateau([8, 4], mode=mode, patience=1, end=None)
        feed(schedule, [best, best])
        feed(schedule, [value], first=20)
        assert schedule.rungs(0, 1000)[-1][1] == expected


def test_after_going_back_it_tries_again_after_patience_and_then_stays():
    schedule = went_back(max_rollbacks=1)
    feed(schedule, [9.0], first=20)
    assert feed(schedule, [0.9, 0.8], first=30) == {}  # improves on 8 bits
    assert list(feed(schedule, [0.8], first=50)) == [60]
    stays = feed(schedule, [9.0, 8.0, 7.0], first=60)
    assert stays == {step: f"val/loss is {v} after going to 4 bits, and training goes on there" for step, v in
                     ((70, 9), (80, 8))}  # fmt: skip
    assert schedule.rungs(0, 1000)[:4] == [(0, 8), (20, 4), (30, 8), (60, 4)]


def test_the_best_of_the_wider_rung_still_counts_after_going_back():
    schedule = went_back()
    feed(schedule, [9.0], first=20)
    assert list(feed(schedule, [1.0], first=30)) == [40]  # not better than the 1.0 before


def test_the_end_is_kept_come_what_may():
    schedule = Plateau([8, 4], patience=1, end=100)
    feed(schedule, [1.0 / n for n in range(1, 10)])  # 90 steps, improving
    assert schedule.rungs(0, 1000) == [(0, 8), (100, 4)]
    assert feed(schedule, [math.nan], first=110) == {
        120: "val/loss is nan after going to 4 bits, and training goes on there"
    }
    assert schedule.rungs(0, 1000) == [(0, 8), (100, 4)]


def test_a_second_validation_before_the_same_step_does_not_undo_what_the_first_decided():
    for losses, rungs in (([1.0, 1.0], [(0, 8), (20, 4)]), ([1.0, 1.0, 9.0], [(0, 8), (20, 4), (30, 8)])):
        schedule = Plateau([8, 4, 2], patience=1, end=None)
        feed(schedule, losses)
        state = copy.deepcopy(schedule.state_dict())
        step = 10 * len(losses)
        for loss in (9.0, 0.5):
            assert schedule.update({"val/loss": loss}, step, 0, None) is None
        assert schedule.rungs(0, None) == rungs
        assert schedule.state_dict() == state


def test_roll_back_can_be_switched_off():
    schedule = Plateau([8, 4], patience=1, end=None, roll_back=False)
    feed(schedule, [1.0, 1.0])
    assert feed(schedule, [math.nan, 5.0], first=20) == {}
    assert not schedule.may_go_back(25, 0, 1000)


def test_it_says_for_how_long_the_end_of_a_rung_is_needed():
    schedule = Plateau([8, 4, 2], patience=1, trial=2, end=100)
    assert not schedule.may_go_back(5, 0, 1000)  # nothing comes before the first rung
    feed(schedule, [1.0, 1.0])
    assert schedule.may_go_back(20, 0, 1000)
    feed(schedule, [1.5], first=20)
    assert schedule.may_go_back(35, 0, 1000)
    feed(schedule, [1.4], first=30)
    assert not schedule.may_go_back(45, 0, 1000)  # two validations were passed
    assert not schedule.may_go_back(105, 0, 1000)  # at 2 bits, after the end


@given(
    losses=st.lists(st.sampled_from([0.5, 1.0, 1.5, 3.0, math.nan]), max_size=40),
    cut=st.integers(0, 40),
    total=st.one_of(st.none(), st.integers(50, 500)),
    patience=st.integers(1, 3),
    end=st.sampled_from([None, 40]),
)
def test_whatever_the_metrics_are(losses, cut, total, patience, end):
    """Rungs start at the start, reach the end in time, the past never changes, and a restored copy goes on alike."""
    schedule = Plateau([8, 4, 3, 2], patience=patience, end=end)
    twin, known, plan = copy.deepcopy(schedule), [(3, 8)], schedule.rungs(3, total)
    for number, loss in enumerate(losses, start=1):
        step = 3 + 5 * number
        decided = [each.update({"val/loss": loss}, step, 3, total) for each in (schedule, twin)]
        assert decided[0] == decided[1]
        if decided[0] is None or "goes on there" in decided[0]:
            assert schedule.rungs(3, total) == plan
        plan = schedule.rungs(3, total)
        if number == cut:
            state = json.loads(json.dumps(schedule.state_dict()))  # primitives only
            twin = Plateau([8, 4, 3, 2], patience=patience, end=end)
            twin.load_state_dict(state)
        rungs = schedule.rungs(3, total)
        assert twin.rungs(3, total) == rungs
        assert rungs[0][0] == 3
        assert [rung for rung in rungs if rung[0] < step] == known
        steps = [first for first, _ in rungs]
        assert steps == sorted(set(steps))
        if end is not None:
            assert rungs[-1][1] == 2
            assert rungs[-1][0] <= max(end, 3)
        known = [rung for rung in rungs if rung[0] < step + 5]


def test_a_longer_run_does_not_undo_what_the_time_decided():
    schedule = Plateau([8, 4, 2])
    feed(schedule, [1.0 / n for n in range(1, 4)], every=100, total=1000)  # improving, and at 4 bits from step 250 on
    assert schedule.rungs(0, 2000) == [(0, 8), (250, 4), (1000, 2)]


def test_the_state_of_other_widths_is_refused_and_none_starts_anew():
    state = Plateau([8, 4]).state_dict()
    with pytest.raises(ValueError, match=r"widths \[8, 4\], and the schedule now has \[8, 2\]"):
        Plateau([8, 2]).load_state_dict(state)
    schedule = went_back()
    schedule.load_state_dict({})
    assert schedule.rungs(0, 1000) == Plateau([8, 4, 2]).rungs(0, 1000)


def test_copies_are_independent():
    schedule = Plateau([8, 4], patience=1)
    twins = copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))
    feed(schedule, [1.0, 1.0])
    assert schedule.rungs(0, 1000) == [(0, 8), (20, 4)]
    assert all(twin.rungs(0, 1000) == [(0, 8), (500, 4)] for twin in twins)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"bits": [4, 8]}, ValueError, "must go down"),
        ({"bits": {0.0: 8, 0.5: 4}}, TypeError, "must be a list of widths: the metric decides"),
        ({"monitor": ""}, TypeError, "name of a metric"),
        ({"mode": "low"}, ValueError, "mode='low' must be 'min' or 'max'"),
        ({"patience": 0}, ValueError, "patience=0 must be positive"),
        ({"patience": None}, TypeError, "patience=None must be a number"),
        ({"trial": 1.5}, TypeError, "trial=1.5 must be a whole number"),
        ({"divergence": 0.5}, ValueError, "divergence=0.5 must be above 1"),
        ({"min_delta": -1.0}, ValueError, "min_delta=-1.0 must be positive"),
        ({"end": 1.0}, ValueError, "training ends before 1.0"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        Plateau(**arguments)


def test_what_does_not_fit_the_run_is_refused():
    with pytest.raises(ValueError, match="as late as step 100, but the run has only 100"):
        Plateau([8, 4], end=100).rungs(0, 100)
    with pytest.raises(ValueError, match="4 bits by step 10, but fake quantization starts only after step 11"):
        Plateau([8, 4], end=10).rungs(11, 100)
    assert Plateau([8, 4, 2]).rungs(0, 1) == [(0, 2)]  # too short for three rungs
