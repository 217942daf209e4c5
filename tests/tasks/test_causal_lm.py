"""Language models of Hugging Face on text from files, in fits as they are run."""

import csv
import json
import math
import pickle

import numpy as np
import pytest
import torch

from lightning_qat import PTQCallback, QATCallback
from lightning_qat.nn import quantized_layers
from lightning_qat.tasks import CausalLMTask, PackedTextDataModule, load_causal_lm
from tests.helpers import make_trainer
from tests.tasks.tiny_models import WORDS, save_llama, save_tokenizer

pytest.importorskip("transformers")
EOS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_tokenizer(path)
    save_llama(path)
    return path


@pytest.fixture
def documents():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 40, (60,), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=generator)) for n in lengths]


def ids(text):
    return [3 + WORDS.index(word) for word in text.split()]


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def make_data(tmp_path, train, folder, **arguments):
    arguments = {"sequence_length": 16, "batch_size": 4, "cache_dir": str(tmp_path / "cache"), **arguments}
    return PackedTextDataModule(train, str(folder), **arguments)


def rows_of(dataset):
    return torch.stack([dataset[index] for index in range(len(dataset))])


def test_packing_keeps_every_token_once_and_ends_documents(tmp_path, folder, documents):
    train = write_jsonl(tmp_path / "a.jsonl", [*documents[:30], "", None, *documents[30:]])
    data = make_data(tmp_path, train, folder, val_fraction=0.2)
    rows = torch.cat([rows_of(data.train_data), rows_of(data.val_data)]).flatten()
    stream = torch.tensor([token for text in documents for token in [*ids(text), EOS]])
    assert rows.dtype == torch.int64
    assert torch.equal(rows, stream[: len(rows)])
    assert len(stream) - len(rows) < 16
    assert len(data.val_data) == round(0.2 * (len(data.train_data) + len(data.val_data)))


def test_rows_across_chunks_of_the_cache_are_whole(tmp_path, folder):
    texts = [f"{WORDS[i % 5]} {WORDS[i % 7]}" for i in range(2500)]  # more than datasets writes at once
    data = make_data(tmp_path, write_jsonl(tmp_path / "a.jsonl", texts), folder)
    rows = torch.cat([rows_of(data.train_data), rows_of(data.val_data)]).flatten()
    assert torch.equal(rows, torch.tensor([token for text in texts for token in [*ids(text), EOS]])[: len(rows)])
    assert torch.equal(pickle.loads(pickle.dumps(data.train_data))[7], data.train_data[7])


@pytest.mark.parametrize("ending", ["txt", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_tokens(ending, tmp_path, folder, documents):
    path = tmp_path / f"a.{ending}"
    if ending == "txt":
        path.write_text("\n".join(documents) + "\n")
    elif ending == "csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([["text"], *[[text] for text in documents]])
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pytest.importorskip("pyarrow").table({"text": documents}), path)
    data = make_data(tmp_path, str(path), folder, sample_by="line")
    expected = make_data(tmp_path, write_jsonl(tmp_path / "a.jsonl", documents), folder)
    assert data.data_hash == expected.data_hash


def test_a_text_file_is_one_document_unless_told_otherwise(tmp_path, folder, documents):
    (tmp_path / "a.txt").write_text("\n".join(documents))
    data = make_data(tmp_path, [str(tmp_path / "a.txt")], folder)
    assert EOS not in rows_of(data.train_data)


def test_text_is_tokenized_once(tmp_path, folder, documents, monkeypatch):
    train = write_jsonl(tmp_path / "a.jsonl", documents)
    first = make_data(tmp_path, train, folder)
    hashed = first.data_hash
    monkeypatch.setattr("lightning_qat.tasks.packed_text.tokenize", _fail)
    assert make_data(tmp_path, train, folder, batch_size=2).data_hash == hashed
    assert make_data(tmp_path, train, folder, sequence_length=8).data_hash != hashed
    with pytest.raises(RuntimeError, match="tokenized again"):
        make_data(tmp_path, train, folder, eos_token="[PAD]").setup("fit")


def _fail(*_, **__):
    raise RuntimeError("tokenized again")


_fail.__qualname__ = "tokenize"  # by which the cache knows it


def test_seeds_give_the_same_order_and_no_other_does(tmp_path, folder, documents):
    train = write_jsonl(tmp_path / "a.jsonl", documents)

    def order(seed, **arguments):
        return torch.cat(list(make_data(tmp_path, train, folder, seed=seed, **arguments).train_dataloader()))

    assert torch.equal(order(0), order(0))
    assert torch.equal(order(0), order(0, num_workers=1))
    assert not torch.equal(order(0), order(1))


def test_splits_and_files_for_validation(tmp_path, folder, documents):
    train = write_jsonl(tmp_path / "train.jsonl", documents[:40])
    val = write_jsonl(tmp_path / "val.jsonl", documents[40:])
    data = make_data(tmp_path, train, folder, validation=val)
    stream = [token for text in documents[40:] for token in [*ids(text), EOS]]
    assert rows_of(data.val_data).flatten().tolist() == stream[: len(stream) // 16 * 16]
    whole = tmp_path / "set"
    whole.mkdir()
    write_jsonl(whole / "train.jsonl", documents[:40])
    write_jsonl(whole / "test.jsonl", documents[40:])
    assert make_data(tmp_path, str(whole), folder, val_split="test").data_hash == data.data_hash


def test_streams_pack_the_same_tokens_and_shuffle_anew_in_every_epoch(tmp_path, folder, documents):
    train, arguments = write_jsonl(tmp_path / "a.jsonl", documents), {"streaming": True, "batch_size": 2}
    data = make_data(tmp_path, train, folder, validation=train, **arguments)
    stream = [token for text in documents for token in [*ids(text), EOS]]
    val = torch.cat(list(data.val_dataloader())).flatten().tolist()
    assert val == stream[: len(stream) // 16 * 16]
    loader = data.train_dataloader()
    epochs = [torch.cat(list(loader)) for _ in range(2)]
    assert not torch.equal(*epochs)
    again = make_data(tmp_path, train, folder, validation=train, **arguments).train_dataloader()
    assert torch.equal(torch.cat(list(again)), epochs[0])
    loader = make_data(tmp_path, train, folder, validation=train, num_workers=1, **arguments).train_dataloader()
    assert not torch.equal(*(torch.cat(list(loader)) for _ in range(2)))
    with pytest.raises(ValueError, match="No share of a stream can be held out: give validation="):
        make_data(tmp_path, train, folder, **arguments).setup("fit")


@pytest.mark.parametrize("shape", [(50, 16), (800,)])
def test_token_ids_are_read_from_arrays_as_they_are(shape, tmp_path):
    tokens = np.arange(800, dtype=np.uint16).reshape(shape)
    np.save(tmp_path / "a.npy", tokens)
    data = PackedTextDataModule(str(tmp_path / "a.npy"), sequence_length=16, batch_size=5, val_fraction=0.1)
    rows = torch.cat([rows_of(data.train_data), rows_of(data.val_data)])
    assert rows.flatten().tolist() == list(range(800))
    assert len(data.val_data) == 5


def test_what_cannot_work_is_refused_with_the_remedy(tmp_path, folder, documents):
    train = write_jsonl(tmp_path / "a.jsonl", documents)
    np.save(tmp_path / "rows.npy", np.zeros((4, 8), dtype=np.uint16))
    np.save(tmp_path / "floats.npy", np.zeros(64))
    (tmp_path / "plain").mkdir()
    save_tokenizer(tmp_path / "plain", eos=None)
    cases = [
        ({"train": "nowhere.jsonl"}, FileNotFoundError, "no file 'nowhere.jsonl'.*Give files"),
        ({"train": "no/such_dataset"}, FileNotFoundError, "cannot be read.*Give files"),
        ({"train": [train, str(tmp_path / "rows.npy")]}, ValueError, "Give files of one kind"),
        ({"train": str(tmp_path / "rows.npy")}, ValueError, "rows of 8 tokens. Give sequence_length=8"),
        ({"train": str(tmp_path / "floats.npy")}, ValueError, "not token ids: save whole numbers"),
        ({"text_column": "body"}, ValueError, "no column 'body', but .'text'.. Name it with text_column="),
        ({"tokenizer": None}, ValueError, "Text needs a tokenizer"),
        ({"tokenizer": str(tmp_path)}, FileNotFoundError, "(?s)cannot load.*Give a folder that holds it"),
        ({"tokenizer": str(tmp_path / "plain")}, ValueError, "no end-of-text token.*eos_token="),
        ({"eos_token": "<eos>"}, ValueError, "no token '<eos>'.*eos_token="),
        ({"sequence_length": 100_000}, ValueError, "less than one row.*smaller sequence_length"),
        ({"sequence_length": 1}, ValueError, "Give at least 2"),
        ({"val_fraction": 1.0}, ValueError, "Give a share between 0 and 1"),
        ({"batch_size": 5000}, ValueError, "too few for a batch of 5000. Use a smaller batch_size"),
    ]
    for changed, kind, message in cases:
        arguments = {"train": train, "tokenizer": str(folder), "sequence_length": 16, "batch_size": 4, **changed}
        with pytest.raises(kind, match=message):
            PackedTextDataModule(**arguments, cache_dir=str(tmp_path / "cache")).train_dataloader()


@pytest.mark.parametrize("lora", [None, {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}])
def test_a_pretrained_model_trains_quantized_and_is_scored(lora, tmp_path, folder, documents):
    if lora:
        pytest.importorskip("peft")
    data = make_data(tmp_path, write_jsonl(tmp_path / "a.jsonl", documents * 2), folder, val_fraction=0.11)
    assert len(data.val_data) % 4  # the last batch is short
    task = CausalLMTask(load_causal_lm(str(folder), lora=lora), lr=1e-2, warmup_steps=0)
    frozen = {name: each.clone() for name, each in task.named_parameters() if not each.requires_grad}
    qat = QATCallback("w4g32-pad")
    ptq = PTQCallback(("rtn", "gptq"), calibration_samples=8, results=tmp_path / "ptq.jsonl")
    trainer = make_trainer(qat, ptq, max_epochs=2, check_val_every_n_epoch=1)
    before = make_trainer().validate(task, data, verbose=False)[0]["val/perplexity"]
    trainer.fit(task, datamodule=data)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert metrics["val/perplexity"] < before
    assert metrics["ptq_of_latent/gptq_w4/val/perplexity"] == pytest.approx(metrics["val/perplexity"], rel=0.2)
    assert len(quantized_layers(task)) == 14
    assert bool(frozen) == bool(lora)
    after = dict(task.named_parameters())
    assert all(torch.equal(weight, after[name]) for name, weight in frozen.items() if name in after)


def test_perplexity_counts_every_predicted_token_once(tmp_path, folder, documents):
    data = make_data(tmp_path, write_jsonl(tmp_path / "a.jsonl", documents), folder, val_fraction=0.4, batch_size=7)
    task = CausalLMTask(load_causal_lm(str(folder)))
    logged = make_trainer().validate(task, data, verbose=False)[0]["val/perplexity"]
    rows = rows_of(data.val_data)
    with torch.no_grad():
        log_probs = task(rows[:, :-1]).double().log_softmax(-1)
    assert logged == pytest.approx(math.exp(-log_probs.gather(-1, rows[:, 1:, None]).mean().item()), rel=1e-4)


def test_models_that_cannot_be_loaded_are_refused(tmp_path, folder, monkeypatch):
    with pytest.raises(FileNotFoundError, match="Give a folder that holds it, or the name of a model"):
        load_causal_lm(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="must be the name of a floating-point type"):
        load_causal_lm(str(folder), dtype="int8")
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ImportError, match=r"lora= needs peft: pip install 'lightning-qat\[lora\]'"):
        load_causal_lm(str(folder), lora={"r": 2})
