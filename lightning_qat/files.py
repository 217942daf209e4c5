"""Reading checkpoint files that may be damaged, cut off, or made to run code."""

from __future__ import annotations

import pickle
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

_REMEDY = "Take another checkpoint of the run, or copy the file again from where it was saved."


def check_file(path: str | Path) -> None:
    """Check that a file of ``torch.save`` is whole, by the checksums that it holds of all its parts.

    ``torch.load`` does not look at them, and would go on with altered weights. Nothing is checked of files in torch's
    format before 1.6, which has none, nor where torch is told to write none
    (``torch.serialization.set_crc32_options``).

    Raises:
        ValueError: If a part is missing or altered; the message names the file.
    """
    path = Path(path)
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04" or not torch.serialization.get_crc32_options():
            return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is cut off or damaged ({error}). {_REMEDY}") from error
    if damaged is not None:
        raise ValueError(f"{path} is damaged: the checksum of '{damaged}' in it is wrong. {_REMEDY}")


def _reason(error: Exception) -> str:
    """Return the line of torch's explanation that names what it did not load."""
    lines = [line.strip() for line in str(error).splitlines()]
    named = [line for line in lines if "GLOBAL" in line or "Unsupported" in line]
    return named[0].partition(" by default")[0].rstrip(".") if named else type(error).__name__


def read_checkpoint(path: str | Path, weights_only: bool = True) -> Mapping[str, Any]:
    """Return the content of a checkpoint, on the CPU.

    Args:
        path: The file.
        weights_only: Whether only plain data and tensors may be in it, so that no code is run.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint, is damaged, or holds other objects.
    """
    check_file(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=weights_only)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is no checkpoint, or holds objects that are no plain data, which could run code when they are "
            f"loaded; nothing was ({_reason(error)}). If you trust who made it, pass weights_only=False."
        ) from error
    except (RuntimeError, OSError, EOFError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no checkpoint, or is cut off or damaged ({error}). {_REMEDY}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, and no checkpoint.")
    return content
