import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_qat.records import EvalRecord, append_records, read_records, recovery, replace_records


def make_record(**fields):
    defaults = {
        "method": "qat",
        "scheme": "w4g32",
        "num_bits": 4,
        "effective_bits": 5.0,
        "model_bits": 7.5,
        "metric": "perplexity",
        "value": 3.5,
        "higher_is_better": False,
        "step": 100,
        "trained_with": "qat",
        "seed": 0,
    }
    return EvalRecord(**{**defaults, **fields})


def test_records_survive_the_file(tmp_path):
    path = tmp_path / "runs" / "results.jsonl"
    records = [make_record(seed=seed, value=math.inf if seed else 3.5, data_hash="ab") for seed in range(3)]
    for record in records:
        append_records(path, record)
    assert read_records(path) == records
    assert len(path.read_text().splitlines()) == 3
    assert {"python", "torch", "lightning"} <= set(records[0].versions)


def test_half_a_line_left_by_a_crash_is_removed(tmp_path):
    path = tmp_path / "results.jsonl"
    append_records(path, make_record(seed=0))
    with path.open("a") as file:
        file.write('{"method": "qat", "sch')
    append_records(path, make_record(seed=1))
    assert [record.seed for record in read_records(path)] == [0, 1]


@pytest.mark.parametrize("line", ["{", "[1, 2]", json.dumps({"method": "qat"}), json.dumps({"methods": 1})])
def test_lines_that_are_no_records_are_named(line, tmp_path):
    path = tmp_path / "results.jsonl"
    append_records(path, make_record())
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=r"results.jsonl, line 2 is not a record"):
        read_records(path)


def test_loss_is_oriented_and_log_for_perplexity():
    assert make_record(value=math.e).loss == pytest.approx(1.0)
    assert make_record(metric="accuracy", value=0.9, higher_is_better=True).loss == -0.9
    assert make_record(metric="nll", value=0.9).loss == 0.9


def test_recovery_is_the_share_of_the_loss_that_is_regained():
    assert recovery([2.0], [3.0], [2.0]) == 1.0
    assert recovery([3.0], [3.0], [2.0]) == 0.0
    assert recovery([3.5], [3.0], [2.0]) == -0.5  # worse than round-to-nearest
    assert recovery([1.5], [3.0], [2.0]) == 1.5  # better than float: not clipped


def test_recovery_is_not_given_where_there_is_nothing_to_recover():
    assert recovery([1.0], [1.005], [1.0]) is None  # below the minimum gap, with one seed
    assert recovery([1.0], [0.9], [1.0]) is None
    noisy = [1.02, 1.00, 1.04]
    assert recovery([1.0] * 3, noisy, [1.0] * 3) is None  # 0.02 on average, 0.02 standard deviation
    assert recovery([1.0] * 3, [value + 0.1 for value in noisy], [1.0] * 3) == pytest.approx(1.0)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("position", range(3))
def test_recovery_is_not_given_where_a_run_diverged(bad, position):
    losses = [[2.0, 2.0], [3.0, 3.0], [1.0, 1.0]]
    losses[position][1] = bad
    assert recovery(*losses) is None
    assert recovery(*([loss[1]] for loss in losses)) is None


positive = st.floats(0.1, 10)


@given(ours=positive, reference=positive, gap=positive, factor=positive, shift=st.floats(-5, 5))
def test_recovery_does_not_depend_on_unit_or_origin(ours, reference, gap, factor, shift):
    losses = (ours, reference + gap, reference)
    first = recovery(*([loss] for loss in losses))
    second = recovery(*([factor * loss + shift] for loss in losses), minimum_gap=0.001)
    assert second == pytest.approx(first, rel=1e-6, abs=1e-6)


def test_records_of_a_run_that_went_back_take_the_place_of_the_old_ones(tmp_path):
    path = tmp_path / "results.jsonl"
    first, second = make_record(step=10, value=1.0), make_record(step=20, value=2.0)
    replace_records(path, first)  # there is no file yet
    append_records(path, second, make_record(step=20, value=2.0, seed=1))
    path.write_text(path.read_text() + '{"half": ')
    again = make_record(step=20, value=2.5, cost_seconds=3.0)
    replace_records(path, again)
    assert read_records(path) == [first, make_record(step=20, value=2.0, seed=1), again]
    assert [each.name for each in tmp_path.iterdir()] == ["results.jsonl"]


def test_records_of_a_run_that_was_started_again_are_there_once_and_those_of_another_run_stay(tmp_path):
    path = tmp_path / "results.jsonl"
    other = make_record(step=10, value=2.0)
    append_records(path, make_record(step=10, value=1.0), other, make_record(step=10, value=math.nan, seed=1))
    again = make_record(step=10, value=1.0, cost_seconds=3.0), make_record(step=10, value=math.nan, seed=1)
    replace_records(path, *again, if_equal=True)
    assert [str(each) for each in read_records(path)] == [str(each) for each in (other, *again)]
