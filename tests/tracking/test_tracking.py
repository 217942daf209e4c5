import dataclasses
import io

import pytest
from rich.console import Console

from lightning_qat.tracking.figures import draw_quality_vs_bits
from lightning_qat.tracking.rows import make_rows
from lightning_qat.tracking.tables import make_table
from tests.test_records import make_record

# Perplexity by method, width and step; the second seed is a little worse throughout.
SCORES = {
    ("float_base", 32, 0): 4.0,
    ("float_control", 32, 100): 3.9,
    ("rtn", 8, 100): 3.9,
    ("qat", 8, 100): 3.9,
    ("float_control", 32, 200): 3.8,
    ("rtn", 2, 200): 30.0,
    ("qat", 2, 200): 4.5,
}


def make_records(seeds=(0,)):
    return [
        make_record(method=method, num_bits=bits, step=step, value=value * (1 + 0.01 * seed), seed=seed)
        for seed in seeds
        for (method, bits, step), value in SCORES.items()
    ]


def test_rows_compare_with_the_control_at_the_same_step():
    rows = {(row.method, row.num_bits): row for row in make_rows(make_records())}
    assert rows["qat", 2].increase == pytest.approx(4.5 / 3.8 - 1)
    assert rows["rtn", 2].increase == pytest.approx(30 / 3.8 - 1)
    assert rows["float_control", None].increase is None
    assert rows["qat", 8].recovery is None  # round-to-nearest loses nothing at 8 bits
    assert rows["qat", 2].recovery == pytest.approx(0.918, abs=1e-3)  # ln(30/4.5) / ln(30/3.8)


def test_the_reference_is_the_better_of_base_and_control():
    records = [
        make_record(
            method=r.method, num_bits=r.num_bits, step=r.step, value=2.0 if r.method == "float_base" else r.value
        )
        for r in make_records()
    ]
    recovered = {(row.method, row.num_bits): row.recovery for row in make_rows(records)}
    assert recovered["qat", 2] == pytest.approx(0.7006, abs=1e-3)  # ln(30/4.5) / ln(30/2)


def test_seeds_are_averaged():
    rows = {(row.method, row.num_bits): row for row in make_rows(make_records(seeds=(0, 1, 2)))}
    assert rows["qat", 2].mean == pytest.approx(4.5 * 1.01)
    assert rows["qat", 2].std == pytest.approx(0.045)
    assert rows["qat", 2].increase == pytest.approx(4.5 / 3.8 - 1)


def test_each_width_has_a_baseline_of_its_own():
    """Two widths scored at one step."""
    records = [
        make_record(method=method, num_bits=bits, step=step, value=value)
        for method, bits, step, value in (
            ("float_base", 32, 0, 4.0),
            ("float_control", 32, 100, 4.0),
            ("rtn", 3, 100, 8.0),
            ("rtn", 2, 100, 32.0),
            ("qat", 2, 100, 8.0),
        )
    ]
    (qat,) = (row for row in make_rows(records) if row.method == "qat")
    assert qat.recovery == pytest.approx(2 / 3)  # ln(32/8) / ln(32/4)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_diverged_seed_does_not_take_the_report_along(bad, tmp_path):
    records = make_records(seeds=(0, 1))
    records[-1] = dataclasses.replace(records[-1], value=bad)
    rows = make_rows(records)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(make_table(rows, "A title"))
    assert f"{bad} ± nan" in console.export_text()
    draw_quality_vs_bits(rows, "A title", tmp_path / "figure.png")


def test_a_control_of_zero_and_float_records_alone_can_be_reported(tmp_path):
    zero = [dataclasses.replace(r, metric="error", value=0.0 if "float" in r.method else 1.0) for r in make_records()]
    assert all(row.increase is None for row in make_rows(zero))
    floats = [record for record in make_records() if "float" in record.method]
    draw_quality_vs_bits(make_rows(floats), "A title", tmp_path / "figure.png")


def test_a_missing_seed_and_mixed_metrics_are_refused():
    with pytest.raises(ValueError, match="was scored for the seeds"):
        make_rows(make_records(seeds=(0, 1))[:-1])
    with pytest.raises(ValueError, match="several metrics"):
        make_rows([*make_records(), make_record(metric="accuracy")])


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_table_and_figure(seeds, tmp_path):
    rows = make_rows(make_records(seeds))
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(make_table(rows, "A title"))
    text = console.export_text()
    for expected in ("A title", "QAT", "round to nearest", "float control", "92%", "+18.4%", "n/a"):
        assert expected in text
    assert ("±" in text) == (len(seeds) > 1)
    path = draw_quality_vs_bits(rows, "A title", tmp_path / "figure.png")
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_figure_says_what_a_slide_needs(tmp_path):
    path = draw_quality_vs_bits(make_rows(make_records()), "A title", tmp_path / "figure.svg")
    svg = path.read_text()
    for text in ("A title", "QAT", "round to nearest", "float control, same step", "bits per weight", "log scale"):
        assert f"<!-- {text}" in svg or text in svg
