"""One line per evaluated model: records, their file, and the recovery that compares them."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

FLOAT_BASE, FLOAT_CONTROL = "float_base", "float_control"
"""Methods of the records in float: before fine-tuning, and fine-tuned for as long as QAT."""

MINIMUM_GAP = 0.01
"""With one seed: the smallest loss of round-to-nearest (nats, or a share of 1) of which a recovery is given."""


def package_versions(packages: Iterable[str] = ("lightning-qat", "lightning", "torch")) -> dict[str, str]:
    """Return the versions of Python and of ``packages``; one that is not installed is left out."""
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


@dataclass(frozen=True)
class EvalRecord:
    """The score of one model on one data set.

    Attributes:
        method: How the weights were quantized: ``float`` (not at all), ``rtn``, ``qat``, ...
        scheme: Shorthand of the scheme, or None in float.
        num_bits: Width of the quantized weights in bits; 32 in float.
        effective_bits: Bits per quantized weight, scales and zero-points included.
        model_bits: The same for all parameters of the model.
        metric: Name of the metric, such as ``perplexity``.
        value: Its value.
        higher_is_better: Its direction.
        step: Optimizer steps of fine-tuning.
        trained_with: What the weights were trained as: ``float`` or ``qat``.
        seed: Seed of the run.
        stored_bits: Bits per quantized weight in the exported file, if there is one.
        cost_seconds: Wall time of the whole training run, or of the quantization.
        data_hash: Hash of the data that was scored.
        calibration: ``one-shot``, ``sequential``, or None where inputs were not needed.
        limit_val_batches: Number of validation batches of each loader, if not all were scored.
        versions: Versions of Python and packages.
    """

    method: str
    scheme: str | None
    num_bits: float
    effective_bits: float
    model_bits: float
    metric: str
    value: float
    higher_is_better: bool
    step: int
    trained_with: str
    seed: int
    stored_bits: float | None = None
    cost_seconds: float | None = None
    data_hash: str | None = None
    calibration: str | None = None
    limit_val_batches: int | None = None
    versions: dict[str, str] = field(default_factory=package_versions)

    @property
    def loss(self) -> float:
        """The value as a number of which less is better, and differences make sense: NLL for perplexity."""
        if self.metric == "perplexity":
            return math.log(self.value)
        return -self.value if self.higher_is_better else self.value


def append_records(path: str | Path, *records: EvalRecord) -> None:
    """Add ``records`` to a JSON Lines file with one write; half a line left by a crash is removed first."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        content = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
        os.ftruncate(descriptor, content.rfind(b"\n") + 1)
        os.write(descriptor, _to_lines(records).encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_records(path: str | Path, *records: EvalRecord, if_equal: bool = False) -> None:
    """Add ``records`` in place of those of the same models and steps: of a run that went back to a checkpoint.

    The file is written anew and put in place at once, so that a crash leaves the old one or the new one.

    Args:
        path: The JSON Lines file.
        records: What is added.
        if_equal: Replace only records of equal value: those of a run that died before its first checkpoint and was
            started again. Others of the same models and steps are of another run, and stay.
    """
    path = Path(path)
    content = path.read_bytes() if path.is_file() else b""
    outcome = ("cost_seconds", "versions") if if_equal else ("value", "cost_seconds", "versions")
    new = {_identity(asdict(record), outcome) for record in records}
    whole_lines = content[: content.rfind(b"\n") + 1].splitlines(keepends=True)
    kept = [line for line in whole_lines if _identity(json.loads(line), outcome) not in new]
    if len(kept) < len(whole_lines):
        _put_in_place(path, b"".join(kept))
    append_records(path, *records)


def write_records(path: str | Path, *records: EvalRecord) -> None:
    """Let a JSON Lines file hold ``records`` and nothing else, put in place at once."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _put_in_place(path, _to_lines(records).encode())


def _to_lines(records: Iterable[EvalRecord]) -> str:
    return "".join(json.dumps(asdict(record), allow_nan=True) + "\n" for record in records)


def _put_in_place(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _identity(record: Mapping[str, Any], outcome: tuple[str, ...]) -> str:
    """Return what says which model was scored on what, and not how well or at which cost."""
    return json.dumps({key: value for key, value in record.items() if key not in outcome}, sort_keys=True)


def read_records(path: str | Path) -> list[EvalRecord]:
    """Return the records of a JSON Lines file, in order.

    Raises:
        ValueError: If a line is not a record; its number is named.
    """
    records = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            content: dict[str, Any] = json.loads(line)
            records.append(EvalRecord(**content))
        except (json.JSONDecodeError, TypeError) as error:
            known = ", ".join(entry.name for entry in fields(EvalRecord))
            raise ValueError(f"{path}, line {number} is not a record with the fields {known}: {error}") from error
    return records


def recovery(
    quantized: Sequence[float], baseline: Sequence[float], reference: Sequence[float], minimum_gap: float = MINIMUM_GAP
) -> float | None:
    """Return how much of what round-to-nearest loses a method gets back: 0 is nothing, 1 is all.

    ``(RTN - method) / (RTN - reference)``, each averaged over seeds, as losses (:attr:`EvalRecord.loss`).
    It can be negative or above 1. The reference is the better of the float base and of the float control
    that was trained for as many steps, so that further training alone is no recovery.

    Args:
        quantized: Loss of the method, one per seed.
        baseline: Loss of round-to-nearest of the float control, seed by seed.
        reference: Loss of the reference, seed by seed.
        minimum_gap: The smallest mean gap for which a single seed gives a recovery.

    Returns:
        The recovery, or None if the gap is below three standard deviations over seeds (below
        ``minimum_gap`` with one seed), so that there is nothing to recover, or a loss is not finite.

    Example::

        >>> recovery([2.25], baseline=[3.0], reference=[2.0])
        0.75
    """
    if not all(map(math.isfinite, [*quantized, *baseline, *reference])):
        return None
    gaps = [worse - better for worse, better in zip(baseline, reference, strict=True)]
    regained = [worse - ours for worse, ours in zip(baseline, quantized, strict=True)]
    threshold = 3 * statistics.stdev(gaps) if len(gaps) > 1 else minimum_gap
    gap = statistics.fmean(gaps)
    if gap <= 0 or gap < threshold:
        return None
    return statistics.fmean(regained) / gap
