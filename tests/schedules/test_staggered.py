"""Weights and inputs at widths of their own."""

import pytest

from lightning_qat.callbacks.arguments import build_schedule
from lightning_qat.nn import parse_rules
from lightning_qat.schedules import Cosine, Linear, Plateau, Staggered, Staircase


def test_the_parts_are_schedules_for_themselves():
    schedule = Staggered(weights={0.0: 16, 0.3: 4}, activations=Cosine(8, start_bits=16, end=0.1))
    assert schedule.rungs(0, 100) == [(0, 16), (30, 4)]
    assert schedule.activation_rungs(0, 100) == [(0, 16), (10, 8)]
    assert schedule.final_bits == 4
    assert schedule.is_fractional


@pytest.mark.parametrize(
    ("weights", "inputs", "expected"),
    [
        ([4], [8], False),
        ([4], {0: 16, 5: 8}, False),
        ([8, 4], {0: 16, 5: 8}, True),  # a list shares the run equally
        ({0: 16, 5: 4}, {0.0: 16, 0.5: 8}, True),
    ],
)
def test_one_part_with_fractions_is_enough_to_need_the_length_of_the_run(weights, inputs, expected):
    assert Staggered(weights, inputs).is_fractional is expected


def test_parts_end_at_the_width_of_what_they_are_for():
    spec = {"name": "staggered", "weights": "linear", "activations": {"name": "cosine", "end": 0.2}}
    schedule = build_schedule(spec, parse_rules("w2a4"))
    assert schedule == Staggered(Linear(2), Cosine(4, end=0.2))
    rules = parse_rules([{"target": "a", "scheme": "w4a8"}, {"target": "b", "scheme": "w8a6"}])
    assert build_schedule(spec, rules) == Staggered(Linear(4), Cosine(6, end=0.2))


@pytest.mark.parametrize(
    ("spec", "scheme", "message"),
    [
        ({"weights": [8, 4], "activations": [4]}, "w4a8", "schedule of the activations ends at 4 bits, but the"),
        ({"weights": [8], "activations": [8]}, "w4a8", "schedule of the weights ends at 8 bits, but the weights of"),
        ({"weights": [4], "activations": [8]}, "w4", "the scheme leaves them in float. Give a scheme with activ"),
        ({"weights": "plateau", "activations": [8]}, "w2a8", "weights must look at the step alone.*Plateau is not"),
        ({"weights": Staggered([4], [8]), "activations": [8]}, "w4a8", "be one for itself; Staggered is not"),
        ({"weights": "linnear", "activations": [8]}, "w4a8", "no schedule 'linnear'. Did you mean 'linear'"),
    ],
)
def test_bad_parts_are_refused(spec, scheme, message):
    with pytest.raises(ValueError, match=message):
        build_schedule({"name": "staggered", **spec}, parse_rules(scheme))


def test_both_parts_must_be_given():
    with pytest.raises(TypeError, match="'staggered' takes the arguments weights, activations"):
        build_schedule({"name": "staggered", "weights": [4]}, parse_rules("w4a8"))
    with pytest.raises(TypeError, match="schedule=4 must be a list of widths"):
        Staggered(4, [8])


def test_objects_are_taken_as_they_are():
    schedule = Staggered(Staircase([8, 4]), Linear(8, start_bits=16))
    assert build_schedule(schedule, parse_rules("w4a8")) is schedule
    with pytest.raises(ValueError, match="must look at the step alone"):
        Staggered(Plateau([8, 4]), [8])
