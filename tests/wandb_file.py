"""Reads back what W&B wrote offline: the format is internal to it, and its CRCs are not looked at."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

HEADER, BLOCK, RECORD_HEADER = 7, 32 * 1024, 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def read_records(path: Path) -> list[Record]:
    """Return all records of a ``.wandb`` file, a LevelDB log behind a header of its own."""
    data = path.read_bytes()
    assert data[:4] == b":W&B", data[:HEADER]
    return [Record.FromString(payload) for payload in _payloads(data)]


def _payloads(data: bytes) -> Iterator[bytes]:
    position, parts = HEADER, b""
    while position + RECORD_HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < RECORD_HEADER:  # the rest of a block is padding
            position += left
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        assert kind in (FULL, FIRST, MIDDLE, LAST), f"a record of kind {kind} at {position}"
        if position + RECORD_HEADER + length > len(data):  # still being written
            return
        parts += data[position + RECORD_HEADER : position + RECORD_HEADER + length]
        position += RECORD_HEADER + length
        if kind in (FULL, LAST):
            yield parts
            parts = b""


class WandbFile:
    """The run that is in a folder, and was finished: W&B may still be writing the last block, which is waited for."""

    def __init__(self, folder: Path, timeout: float = 60.0) -> None:
        (self.path,) = folder.rglob("*.wandb")
        until = time.monotonic() + timeout
        while not (records := read_records(self.path)) or not records[-1].HasField("exit"):
            assert time.monotonic() < until, f"{self.path} has no end"
            time.sleep(0.05)
        self.records = records

    @property
    def history(self) -> list[dict[str, Any]]:
        """What was logged, call by call."""
        rows = [record.history.item for record in self.records if record.HasField("history")]
        return [{_key(item): json.loads(item.value_json) for item in row} for row in rows]

    def series(self, name: str) -> list[tuple[int, float]]:
        """The values of a scalar with their steps."""
        return [(row["trainer/global_step"], row[name]) for row in self.history if name in row]

    @property
    def config(self) -> dict[str, Any]:
        """The configuration; W&B names parts of its own by keys that are joined by dots here."""
        found: dict[str, Any] = {}
        for record in self.records:
            updates = [*record.config.update, *record.run.config.update]
            found.update({_key(item): json.loads(item.value_json) for item in updates})
        return found

    @property
    def metrics(self) -> dict[str, str]:
        """The step metric of every metric or pattern of metrics."""
        defined = [record.metric for record in self.records if record.HasField("metric")]
        return {each.name or each.glob_name: each.step_metric for each in defined}

    @property
    def artifacts(self) -> list[Any]:
        """The artifacts in the order in which they were logged."""
        return [record.artifact for record in self.records if record.HasField("artifact")]

    def table(self, row: dict[str, Any], name: str) -> dict[str, Any]:
        """The table of a row of the history: columns and data."""
        assert row[f"{name}._type"] == "table-file"
        return json.loads((self.path.parent / "files" / row[f"{name}.path"]).read_text())


def _key(item: Any) -> str:
    return item.key or ".".join(item.nested_key)
