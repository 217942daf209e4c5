"""Sentence encoders on pairs from files, in fits as they are run."""

import csv
import json

import numpy as np
import pytest
import torch

from lightning_qat import PTQCallback, QATCallback
from lightning_qat.nn import quantized_layers
from lightning_qat.tasks import SentenceEmbeddingTask, SentencePairDataModule, load_sentence_encoder
from lightning_qat.tasks.sentence_encoder import SentenceEncoder
from tests.helpers import make_trainer
from tests.tasks.tiny_models import WORDS, save_bert, save_tokenizer

pytest.importorskip("transformers")
SWITCHES = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False, "pooling_mode_max_tokens": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder")
    save_tokenizer(path)
    save_bert(path)
    return path


def make_pairs(number):
    """Return sentences and how many of their words they share, 0 to 5; some sentences are empty, or say None."""
    generator = np.random.default_rng(0)
    pairs = [["", "None", 0.0], ["None", "", 2.5]]
    while len(pairs) < number:
        first = generator.choice(WORDS, generator.integers(1, 12))
        shared = generator.integers(0, len(first) + 1)
        second = [*first[:shared], *generator.choice(WORDS, len(first) - shared)]
        pairs.append([" ".join(first), " ".join(second), round(5 * float(shared) / len(first), 3)])
    return pairs


def write_csv(path, pairs, header=("sentence1", "sentence2", "score")):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([*([header] if header else []), *pairs])
    return str(path)


def make_data(tmp_path, train, folder, **arguments):
    return SentencePairDataModule(
        train, str(folder), **{"batch_size": 8, "cache_dir": str(tmp_path / "cache"), **arguments}
    )


def test_batches_are_padded_pairs_in_neighbouring_rows(tmp_path, folder):
    pairs = make_pairs(21)
    train = write_csv(tmp_path / "a.csv", pairs)
    data = make_data(tmp_path, train, folder, validation=train)
    batches = list(data.val_dataloader())
    assert [len(batch["score"]) for batch in batches] == [16, 16, 10]
    for number, batch in enumerate(batches):
        assert set(batch) >= {"input_ids", "attention_mask", "score"}
        for row, tokens in enumerate(batch["input_ids"]):
            *sentences, score = pairs[8 * number + row // 2]
            words = sentences[row % 2].split()
            assert int(batch["attention_mask"][row].sum()) == len(words)
            assert tokens[: len(words)].tolist() == [3 + WORDS.index(w) if w in WORDS else 1 for w in words]
            assert float(batch["score"][row]) == pytest.approx(score / 5)
        assert batch["input_ids"].shape[1] == max(1, int(batch["attention_mask"].sum(1).max()))


def test_sources_give_the_same_pairs(tmp_path, folder):
    pairs, names = make_pairs(30), ["sentence1", "sentence2", "score"]
    expected = make_data(tmp_path, write_csv(tmp_path / "a.csv", pairs), folder)
    headless = write_csv(tmp_path / "b.csv", pairs, header=None)
    assert make_data(tmp_path, headless, folder, csv_columns=names).data_hash == expected.data_hash
    lines = tmp_path / "c.jsonl"
    lines.write_text("".join(json.dumps({"a": a, "b": b, "s": s / 5}) + "\n" for a, b, s in pairs))
    arguments = {"sentence_columns": ["a", "b"], "score_column": "s", "score_max": 1.0}
    assert make_data(tmp_path, str(lines), folder, **arguments).data_hash == expected.data_hash


def test_sentences_are_tokenized_once(tmp_path, folder, monkeypatch):
    train = write_csv(tmp_path / "a.csv", make_pairs(30))
    val = write_csv(tmp_path / "b.csv", make_pairs(40)[30:])  # tokenized by a tokenizer that was in use before
    hashed = make_data(tmp_path, train, folder, validation=val).data_hash

    def tokenize_pairs(*_, **__):
        raise RuntimeError("tokenized again")

    tokenize_pairs.__qualname__ = "tokenize_pairs"  # by which the cache knows it
    monkeypatch.setattr("lightning_qat.tasks.sentence_pairs.tokenize_pairs", tokenize_pairs)
    assert make_data(tmp_path, train, folder, validation=val, seed=1).data_hash == hashed
    with pytest.raises(RuntimeError, match="tokenized again"):
        make_data(tmp_path, train, folder, max_length=4).setup("fit")


def test_seeds_give_the_same_order_and_validation_pairs(tmp_path, folder):
    train = write_csv(tmp_path / "a.csv", make_pairs(60))

    def scores(seed, which="train_dataloader"):
        return torch.cat([batch["score"] for batch in getattr(make_data(tmp_path, train, folder, seed=seed), which)()])

    assert torch.equal(scores(0), scores(0))
    assert not torch.equal(scores(0), scores(1))
    assert torch.equal(scores(0, "val_dataloader"), scores(1, "val_dataloader"))


def test_long_sentences_are_cut_off(tmp_path, folder):
    train = write_csv(tmp_path / "a.csv", make_pairs(30))
    data = make_data(tmp_path, train, folder, max_length=3)
    assert max(batch["input_ids"].shape[1] for batch in data.train_dataloader()) == 3


def test_what_cannot_work_is_refused_with_the_remedy(tmp_path, folder):
    good = make_pairs(20)
    train = write_csv(tmp_path / "a.csv", good)
    headless = write_csv(tmp_path / "b.csv", good, header=None)
    lines = tmp_path / "c.jsonl"
    lines.write_text("".join(json.dumps({"sentence1": a, "sentence2": None, "score": s}) + "\n" for a, _, s in good))
    cases = [
        ({"train": headless}, "Name it with csv_columns= .* or sentence_columns="),
        ({"train": train, "score_column": "label"}, "no column 'label'.*score_column="),
        ({"train": train, "score_max": 1.0}, r"A score is 5.0, not in 0.0 to 1.0: give score_min= and score_max="),
        ({"train": str(lines)}, "20 pairs have nothing in the column 'sentence2'. Leave"),
        ({"train": train, "score_max": 0.0}, "larger than score_min"),
        ({"train": train, "sentence_columns": ["sentence1"]}, "must be two columns"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            make_data(tmp_path, folder=folder, **arguments).setup("fit")


def test_padding_changes_no_embedding(folder):
    model = load_sentence_encoder(str(folder)).eval()
    tokens = torch.randint(3, 10, (2, 5))
    with torch.no_grad():
        alone = model(tokens, torch.ones_like(tokens))
        mask = torch.tensor([[1] * 5 + [0] * 3] * 2)
        padded = model(torch.nn.functional.pad(tokens, (0, 3)), mask)
        nothing = model(tokens, torch.zeros_like(tokens))
    assert torch.allclose(alone, padded, atol=1e-5)
    assert torch.allclose(alone.norm(dim=1), torch.ones(2))
    assert torch.isfinite(nothing).all()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({**SWITCHES, "pooling_mode_mean_tokens": True, "word_embedding_dimension": 32}, "mean"),
        ({**SWITCHES, "pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode": "cls"}, "cls"),
        (None, "mean"),
    ],
)
def test_pooling_is_read_from_the_model(config, expected, folder, tmp_path):
    write_model(folder, tmp_path, config)
    assert load_sentence_encoder(str(tmp_path)).pooling == expected


def write_model(folder, path, pooling, modules=("Transformer", "Pooling", "Normalize")):
    for file in folder.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    (path / "modules.json").write_text(json.dumps([{"type": f"sentence_transformers.models.{m}"} for m in modules]))
    if pooling is not None:
        (path / "1_Pooling").mkdir(exist_ok=True)
        (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


def test_other_poolings_and_parts_are_refused(folder, tmp_path):
    write_model(folder, tmp_path, {**SWITCHES, "pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": True})
    with pytest.raises(ValueError, match=r"pools by 'mean' and 'max_tokens'; only .* give pooling="):
        load_sentence_encoder(str(tmp_path))
    assert load_sentence_encoder(str(tmp_path), pooling="cls").pooling == "cls"
    write_model(folder, tmp_path, None, modules=("Transformer", "Pooling", "Dense"))
    with pytest.raises(ValueError, match="parts that are not supported: Dense"):
        load_sentence_encoder(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="AutoModel cannot load"):
        load_sentence_encoder(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="only 'mean' and 'cls'"):
        SentenceEncoder(torch.nn.Linear(1, 1), "max")


@pytest.mark.parametrize("distillation", [None, {"loss": "mse"}])
def test_an_encoder_trains_quantized_and_is_scored(distillation, folder, tmp_path):
    data = make_data(tmp_path, write_csv(tmp_path / "a.csv", make_pairs(150)), folder, val_fraction=0.2)
    assert len(data.val_data) % 8  # the last batch is short
    task = SentenceEmbeddingTask(load_sentence_encoder(str(folder)), lr=2e-3, warmup_steps=0)
    ptq = PTQCallback(("rtn", "gptq"), calibration_samples=32, results=tmp_path / "ptq.jsonl")
    trainer = make_trainer(
        QATCallback("w4g32", distillation=distillation), ptq, max_epochs=3, check_val_every_n_epoch=3
    )
    before = make_trainer().validate(task, data, verbose=False)[0]
    trainer.fit(task, datamodule=data)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    if distillation is None:
        assert metrics["val/loss"] < before["val/loss"]
        assert metrics["val/spearman"] > before["val/spearman"]
    assert np.isfinite(metrics["ptq_of_latent/gptq_w4/val/spearman"])
    assert len(quantized_layers(task)) == 12
    assert task.model.encoder.pooler is None


def test_spearman_is_that_of_all_pairs(folder, tmp_path):
    stats = pytest.importorskip("scipy.stats")
    train = write_csv(tmp_path / "a.csv", make_pairs(45))
    data = make_data(tmp_path, train, folder, validation=train)
    task = SentenceEmbeddingTask(load_sentence_encoder(str(folder)))
    logged = make_trainer().validate(task, data, verbose=False)[0]["val/spearman"]
    task.eval()
    with torch.no_grad():
        pairs = [task._compare(batch) for batch in data.val_dataloader()]
    similarity, score = (torch.cat(part) for part in zip(*pairs, strict=True))
    assert logged == pytest.approx(stats.spearmanr(similarity, score).statistic, abs=1e-4)
