"""What is recommended is what the benchmark measured, and trains."""

import importlib.util
import warnings
from pathlib import Path

import pytest

from lightning_qat import QATCallback
from lightning_qat.callbacks.recommended import RECOMMENDED
from tests.helpers import TinyTask, batch_at, fit

ARMS = Path(__file__).parents[2] / "benchmarks" / "stories260k_arms.py"


@pytest.mark.skipif(not ARMS.is_file(), reason="the benchmarks are not part of the source distribution")
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_the_arguments_are_those_of_the_arm_that_was_measured(bits):
    spec = importlib.util.spec_from_file_location("stories260k_arms", ARMS)
    arms = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(arms)
    measured = arms.arguments_of("everything", bits, 1e-3)
    measured.pop("scheme")
    assert measured.pop("scale_lr") == 1e-3  # the rate of the weights, which "same" stands for
    assert measured == {name: value for name, value in RECOMMENDED[bits].items() if name != "scale_lr"}
    assert RECOMMENDED[bits]["scale_lr"] == "same"


@pytest.mark.parametrize("scheme", ["w4g8", "w3g8", "w2g8-nozero", "w1.58", "w1"])
def test_it_trains(scheme):
    overrides = {"distillation": {"loss": "mse", "output": lambda outputs: outputs}}
    if scheme == "w4g8":  # the loader of TinyTask has no batches to calibrate on
        overrides["init"] = {**RECOMMENDED[4]["init"], "calibration_data": [batch_at(50)]}
    task, callback = TinyTask(), QATCallback.recommended(scheme, **overrides)
    fit(task, callback, max_steps=8)
    assert task.net[0].weight_fake_quant.log_scale_ratio is not None


def test_overrides_come_first_and_wide_weights_get_the_defaults():
    assert QATCallback.recommended("w3", scale_lr=None, oscillation=None).scale_lr is None
    wide, default = QATCallback.recommended("w8"), QATCallback("w8")
    assert (type(wide.observer), wide.scale_lr) == (type(default.observer), default.scale_lr)
    assert not wide.techniques
    without = QATCallback.recommended("w4", scale_lr=None)  # nothing left for init to begin
    assert "init" not in {technique.name for technique in without.techniques}
    rules = [{"target": "*", "scheme": "w8"}, {"target": "ffn", "scheme": "w4"}]
    assert QATCallback.recommended(rules).scale_lr == "same"


@pytest.mark.parametrize(("scheme", "better"), [("w2g64", "w2g64-nozero"), ("w2-bf16", "w2-nozero-bf16")])
def test_a_grid_with_a_zero_at_two_bits_is_worth_a_word(scheme, better):
    with pytest.warns(UserWarning, match=f"Give '{better}'"):
        QATCallback.recommended(scheme)


@pytest.mark.parametrize("scheme", ["w2-nozero", "w2-asym", "w2-qmax", "w3"])
def test_others_are_not(scheme):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        QATCallback.recommended(scheme)
