"""What an export says of itself, and how a damaged one is noticed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MANIFEST, CARD = "manifest.json", "MODEL_CARD.md"


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Write ``manifest.json`` with ``facts`` and the hash of every file, and a snippet for a model card.

    Returns:
        The content of the manifest.
    """
    paths = [path for path in sorted(folder.iterdir()) if path.name not in (MANIFEST, CARD)]
    files = {path.name: {"bytes": path.stat().st_size, "sha256": hash_file(path)} for path in paths}
    content = {**facts, "bytes": sum(file["bytes"] for file in files.values()), "files": files}
    (folder / MANIFEST).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / CARD).write_text(_card(content), encoding="utf-8")
    return content


def check_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of an export whose files are all as they were written.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If a file is missing, cut off or altered; it is named.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {MANIFEST}: it is not a folder that export has written.")
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        files = content["files"].items()
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}). Export the model again, or copy the folder again.") from error
    for name, expected in files:
        found = folder / name
        if not found.is_file() or hash_file(found) != expected["sha256"]:
            state = "missing" if not found.is_file() else "cut off or altered"
            raise ValueError(f"{found} is {state}. Export the model again, or copy the folder again.")
    return content


def _card(content: Mapping[str, Any]) -> str:
    schemes = ", ".join(f"{scheme} ({count} layers)" for scheme, count in content["schemes"].items())
    lines = [
        "## Quantization",
        "",
        f"- Format: `{content['format']}`, {content['bytes'] / 2**20:.2f} MiB",
        f"- Scheme: {schemes}",
        f"- Bits per weight with scales: {content['effective_bits']:.2f}; stored {content['stored_bits']:.2f}",
        *(f"- {name}: {value:.4f}" for name, value in content["metrics"].items()),
        f"- Made with lightning-qat {content['versions'].get('lightning-qat')}",
    ]
    return "\n".join(lines) + "\n"
