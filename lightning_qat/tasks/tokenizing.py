"""Tokenizers of Hugging Face, and what tells one from another."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from lightning_qat.tasks.sources import import_optional

HF_INSTALL = "'lightning-qat[hf]'"


def load_auto(kind: str, name: str, **arguments: Any) -> Any:
    """Return what ``transformers.<kind>.from_pretrained`` does; code from the Hub is never run.

    Args:
        kind: ``"AutoTokenizer"``, ``"AutoModel"`` and the like.
        name: Name on the Hub, or folder.
        **arguments: Further arguments of ``from_pretrained``.

    Raises:
        ImportError: If transformers is not installed.
        FileNotFoundError: If there is no such model.
    """
    transformers = import_optional("transformers", HF_INSTALL, f"Loading {name!r}")
    try:
        return getattr(transformers, kind).from_pretrained(name, trust_remote_code=False, **arguments)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{kind} cannot load {name!r}: {error} Give a folder that holds it, or the name of a model on the Hugging "
            "Face Hub that can be reached."
        ) from error


def load_tokenizer(name: str | None, eos_token: str | None = None) -> tuple[Any, int]:
    """Return a tokenizer and the id of its end-of-text token.

    Raises:
        ValueError: If no tokenizer is named, or it has no such token.
    """
    if name is None:
        raise ValueError("Text needs a tokenizer: give tokenizer=, the name or folder of one (mostly of the model).")
    tokenizer = load_auto("AutoTokenizer", name)
    eos = tokenizer.eos_token_id if eos_token is None else tokenizer.get_vocab().get(eos_token)
    if eos is None:
        wanted = "no end-of-text token" if eos_token is None else f"no token {eos_token!r}"
        raise ValueError(f"The tokenizer {name!r} has {wanted} to end documents with. Name one of its own: eos_token=.")
    return tokenizer, int(eos)


def tokenizer_key(tokenizer: Any) -> list[Any]:
    """Return plain values that differ for tokenizers that give other tokens, whatever they were used for before."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        # These two are what the last call asked for.
        return [json.dumps({**state, "truncation": None, "padding": None}, sort_keys=True)]
    return [type(tokenizer).__qualname__, sorted(tokenizer.get_vocab().items()), tokenizer.init_kwargs]


def tokenize(batch: Mapping[str, list[str | None]], tokenizer: Any, eos: int, column: str) -> dict[str, list[Any]]:
    """Return the token ids of documents, each with ``eos`` behind it; none for those that are empty.

    Args:
        batch: Documents in ``column``.
        tokenizer: The tokenizer.
        eos: Id of the end-of-text token.
        column: Name of the column.
    """
    texts = [text for text in batch[column] if text]
    if not texts:
        return {"tokens": []}
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return {"tokens": [np.array([*tokens, eos], dtype=np.int32) for tokens in encoded if len(tokens)]}
