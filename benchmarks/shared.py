"""What the benchmarks have in common."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lightning_qat.records import package_versions


def data_folder(name: str) -> Path:
    """Return the folder of a model that is no part of the project, or stop with the reason."""
    root = Path(os.environ.get("LIGHTNING_QAT_DATA", Path(__file__).parents[1] / ".." / "shared" / "data"))
    folder = root / name
    if not folder.is_dir():
        sys.exit(f"There is no {folder}. Set LIGHTNING_QAT_DATA to the folder that holds {name}/.")
    return folder.resolve()


def table(scores: Mapping[tuple[str, str], float], columns: Sequence[str], digits: int) -> list[str]:
    """Return the lines of a table of scores by (row, column); what was not measured stays empty."""
    lines = [f"| method | {' | '.join(f'W{column}' for column in columns)} |", f"|---|{'---|' * len(columns)}"]
    for row in dict.fromkeys(row for row, _ in scores):
        cells = [f"{scores[row, column]:.{digits}f}" if (row, column) in scores else "" for column in columns]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return lines


def publish(out: Path, lines: Sequence[str]) -> None:
    """Print a report and write it, with the conditions, beside the command."""
    text = "\n".join([*lines, "", f"{platform.machine()}, {os.cpu_count()} cores; {package_versions()}."]) + "\n"
    print(text)
    out.mkdir(parents=True, exist_ok=True)
    (out / "README.md").write_text(text)


def read_runs(out: Path) -> list[dict[str, Any]]:
    """Return the runs that a folder has records of."""
    path = out / "runs.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def append_run(out: Path, run: Mapping[str, Any]) -> None:
    """Add the record of a run."""
    with (out / "runs.jsonl").open("a") as file:
        file.write(json.dumps(run) + "\n")
    print(json.dumps(run), flush=True)


def carry_out(script: str, runs: Sequence[Mapping[str, Any]], out: Path, jobs: int) -> None:
    """Run ``script --run JSON`` for each run, some at a time with one thread each, and record its last line."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run_in_process(run: Mapping[str, Any]) -> None:
        command = [sys.executable, "-W", "ignore", script, "--run", json.dumps(run), "--out", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            sys.exit(f"{run} failed:\n{done.stderr[-3000:]}")
        append_run(out, json.loads(done.stdout.strip().splitlines()[-1]))

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run_in_process, runs))
