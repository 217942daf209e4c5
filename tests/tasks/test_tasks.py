import math

import lightning.pytorch as pl
import pytest
import torch

from lightning_qat import prepare
from lightning_qat.nn import make_plan, parse_rules
from lightning_qat.tasks import CausalLMTask, TextDataModule, TinyLM
from lightning_qat.tasks.cifar_resnet import CifarResNet


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"the quick brown fox jumps over the lazy dog. " * 200)
    return str(path)


def make_model():
    return TinyLM(dim=32, num_layers=2, num_heads=2, ffn_dim=64, max_length=32)


def test_the_model_is_causal_and_knows_positions():
    model, tokens = make_model().eval(), torch.randint(0, 256, (2, 16))
    logits = model(tokens)
    assert logits.shape == (2, 16, 256)
    changed = tokens.clone()
    changed[:, 10:] = 0
    assert torch.allclose(model(changed)[:, :10], logits[:, :10], atol=1e-6)
    swapped = tokens.clone()
    swapped[:, [0, 1]] = tokens[:, [1, 0]]
    assert not torch.allclose(model(swapped)[:, -1], logits[:, -1], atol=1e-3)


def test_head_and_embedding_are_one_parameter_and_stay_in_float():
    task = CausalLMTask(make_model())
    assert task.model.lm_head.weight is task.model.embed.weight
    plan = make_plan(task, parse_rules("w4g32"))
    assert len(plan.layers) == 2 * 7
    assert set(plan.skipped) == {"model.embed", "model.lm_head"}


def test_windows_cover_the_text_and_do_not_mix_train_and_validation(text_file):
    data = TextDataModule(text_file, block_size=32, batch_size=8, stride=16)
    data.setup("fit")
    train = torch.cat(list(data.train_dataloader()))
    val = list(data.val_dataloader())
    text = torch.frombuffer(bytearray(data.text), dtype=torch.uint8).long()
    split = int(len(text) * 0.9)
    starts = {tuple(text[start : start + 33].tolist()) for start in range(0, split - 32, 16)}
    assert {tuple(row.tolist()) for row in train} <= starts
    assert torch.equal(torch.cat(val)[:, :-1].flatten(), text[split : split + len(torch.cat(val)) * 32])
    assert len(val[-1]) < 8  # the last batch is short, and counted


def test_the_same_seed_gives_the_same_order(text_file):
    def order(seed):
        data = TextDataModule(text_file, block_size=32, batch_size=8, seed=seed)
        data.setup("fit")
        return torch.cat(list(data.train_dataloader()))

    assert torch.equal(order(0), order(0))
    assert not torch.equal(order(0), order(1))


def test_perplexity_is_the_exponential_of_the_mean_nll_over_all_tokens(text_file):
    data = TextDataModule(text_file, block_size=32, batch_size=8)
    task = CausalLMTask(make_model())
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    logged = trainer.validate(task, datamodule=data, verbose=False)[0]["val/perplexity"]
    rows = torch.cat(list(data.val_dataloader()))
    with torch.no_grad():
        log_probs = task(rows[:, :-1]).double().log_softmax(-1)
    nll = -log_probs.gather(-1, rows[:, 1:, None]).mean().item()
    assert logged == pytest.approx(math.exp(nll), rel=1e-4)


def test_learning_rate_warms_up_and_ends_where_stated():
    task = CausalLMTask(make_model(), warmup_steps=10, final_lr_fraction=0.2)
    assert task._lr_fraction(0, 100) == pytest.approx(1 / 11)
    assert task._lr_fraction(10, 100) == pytest.approx(1.0)
    assert task._lr_fraction(100, 100) == pytest.approx(0.2)
    assert CausalLMTask(make_model(), final_lr_fraction=1.0)._lr_fraction(77, 100) == 1.0


def test_python_carries_enough_english_text():
    topics = TextDataModule("python_topics")
    assert len(topics.text) > 400_000
    assert b"The 'for' statement" in topics.text or b"The `for` statement" in topics.text or b'"for"' in topics.text
    assert len(TextDataModule("python_docstrings").text) > 2 * len(topics.text)
    assert len(topics.data_hash) == 16


def test_bad_corpora_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file 'shakespeare'. Give a path, 'python_topics'"):
        TextDataModule("shakespeare")
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(ValueError, match="too few for a window"):
        TextDataModule(str(tmp_path / "short.txt")).setup("fit")


def test_a_quantized_model_trains(text_file):
    task = CausalLMTask(make_model(), lr=3e-3)
    prepare(task, "w4g32")
    data = TextDataModule(text_file, block_size=32, batch_size=16, stride=8)
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=30, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    before = trainer.validate(task, datamodule=data, verbose=False)[0]["val/perplexity"]
    trainer.fit(task, datamodule=data)
    assert trainer.validate(task, datamodule=data, verbose=False)[0]["val/perplexity"] < 0.2 * before


def test_the_residual_network_for_small_images_has_the_depth_and_size_of_its_source():
    model = CifarResNet()
    weights = [module for module in model.modules() if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear))]
    assert len(weights) == 20
    assert sum(parameter.numel() for parameter in model.parameters()) == 269_722  # 0.27M in table 6
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
