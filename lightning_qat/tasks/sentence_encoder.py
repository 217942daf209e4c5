"""Encoders of sentence-transformers and Hugging Face as one module: tokens in, normalised embeddings out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat.tasks.tokenizing import load_auto

POOLING = ("mean", "cls")
KNOWN_MODULES = ("Transformer", "Pooling", "Normalize")


class SentenceEncoder(nn.Module):
    """A transformer, its outputs pooled over tokens and normalised.

    Args:
        encoder: A Hugging Face model with ``last_hidden_state``.
        pooling: ``"mean"`` of the tokens that are no padding, or ``"cls"``, the first token.

    Raises:
        ValueError: If ``pooling`` is another name.
    """

    def __init__(self, encoder: nn.Module, pooling: str = "mean") -> None:
        super().__init__()
        if pooling not in POOLING:
            raise ValueError(f"pooling={pooling!r} is not supported, only {' and '.join(map(repr, POOLING))}.")
        self.encoder, self.pooling = encoder, pooling

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **others: Tensor) -> Tensor:
        """Return embeddings of length 1, ``[N, D]``, of tokens ``[N, T]``."""
        hidden: Tensor = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **others).last_hidden_state
        return F.normalize(self._pool(hidden, attention_mask), dim=-1)

    def _pool(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        if self.pooling == "cls":
            return hidden[:, 0]
        weights = attention_mask[:, :, None].to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)


def load_sentence_encoder(name: str, pooling: str | None = None, revision: str | None = None) -> nn.Module:
    """Return a pretrained encoder in float32, for :class:`~lightning_qat.tasks.SentenceEmbeddingTask`.

    Args:
        name: Name on the Hub, or folder, of a model of sentence-transformers or any encoder.
        pooling: ``"mean"`` or ``"cls"``. Default: as ``1_Pooling/config.json`` of the model says, and ``"mean"`` where
            there is none.
        revision: Branch, tag or commit on the Hub.

    Raises:
        FileNotFoundError: If there is no such model.
        ImportError: If transformers is not installed.
        ValueError: If the model has another kind of pooling, or parts behind it.
    """
    arguments = {} if revision is None else {"revision": revision}
    encoder = load_auto("AutoModel", name, **arguments)
    if pooling is None:
        _check_modules(name, _read_json(name, "modules.json", revision))
        pooling = _pooling_of(name, _read_json(name, "1_Pooling/config.json", revision))
    if isinstance(getattr(encoder, "pooler", None), nn.Module):
        encoder.pooler = None  # a layer behind the embeddings that nothing uses: it would not be calibrated
    return SentenceEncoder(encoder.to(torch.float32).train(), pooling)


def _check_modules(name: str, modules: Any) -> None:
    kinds = [module["type"].rpartition(".")[2] for module in modules or ()]
    if others := [kind for kind in kinds if kind not in KNOWN_MODULES]:
        raise ValueError(
            f"{name!r} has parts that are not supported: {', '.join(others)}. To train its transformer without them, "
            "say how to pool: pooling='mean'."
        )


def _pooling_of(name: str, config: Any) -> str:
    """Return the kind of pooling of a configuration, which names it, or has a switch for each kind."""
    if config is None:
        return "mean"
    mode = config.get("pooling_mode")
    switched_on = [
        key.removeprefix("pooling_mode_") for key, on in config.items() if key.startswith("pooling_mode_") and on
    ]
    modes = switched_on if mode is None else [mode] if isinstance(mode, str) else list(mode)
    kinds = [{"mean_tokens": "mean", "cls_token": "cls"}.get(kind, kind) for kind in modes]
    if len(kinds) != 1 or kinds[0] not in POOLING:
        raise ValueError(
            f"{name!r} pools by {' and '.join(map(repr, kinds)) or 'nothing'}; only {' and '.join(map(repr, POOLING))} "
            "are supported. To train it with one of these all the same, give pooling=."
        )
    return str(kinds[0])


def _read_json(name: str, file: str, revision: str | None) -> Any:
    """Return what a file of a model holds, or None if the model has no such file.

    Raises:
        FileNotFoundError: If the Hub cannot be asked whether it has.
    """
    if Path(name).is_dir():
        path = Path(name) / file
        return json.loads(path.read_text()) if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return json.loads(Path(hf_hub_download(name, file, revision=revision)).read_text())
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"Whether {name!r} has a {file} cannot be found out offline. Say how it pools: pooling='mean' or 'cls'."
        ) from error
    except EntryNotFoundError:
        return None
