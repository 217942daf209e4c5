"""GPTQ by llm-compressor on a saved model, in a Python that has it; prints one JSON line of seconds and version.

Usage: python peer_llmcompressor.py MODEL_FOLDER ROWS.npy NUM_ROWS NUM_BITS OUT.pt
"""

import json
import sys
import time
from importlib.metadata import version

import numpy as np
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that is never used: oneshot wants one even where the data are token ids."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<unk>": 0}, "<unk>")), pad_token="<unk>")


def main() -> None:
    """Quantize, save the state dict, and print what it took."""
    folder, rows_path, num_rows, num_bits, out = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(folder)
    rows = np.load(rows_path)[: int(num_rows)].astype(np.int64)
    data = Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": np.ones_like(rows).tolist()})
    weights = QuantizationArgs(num_bits=int(num_bits), symmetric=True, strategy="channel")
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    recipe = GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])
    started = time.perf_counter()
    oneshot(
        model=model,
        dataset=data,
        processor=make_tokenizer(),
        recipe=recipe,
        num_calibration_samples=len(rows),
        max_seq_length=rows.shape[1],
    )
    seconds = time.perf_counter() - started
    torch.save({name: p.detach() for name, p in model.named_parameters() if name.endswith("proj.weight")}, out)
    print(json.dumps({"seconds": seconds, "version": version("llmcompressor")}))


if __name__ == "__main__":
    main()
