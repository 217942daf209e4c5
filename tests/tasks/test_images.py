"""Image classification on sets in the layouts that there are, in fits as they are run."""

import io
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import Subset

from lightning_qat import PTQCallback, QATCallback
from lightning_qat.nn import quantized_layers
from lightning_qat.tasks import ImageClassificationTask, ImageDataModule, load_image_model
from lightning_qat.tasks.augmentation import ImageBatch, shift_images
from tests.helpers import make_trainer

pillow = pytest.importorskip("PIL.Image")
NAMES = ["ant", "bee", "cow"]


def make_images(number, size=(8, 8)):
    """Return images whose class is told by their brightest channel."""
    generator = np.random.default_rng(0)
    labels = np.arange(number) % 3
    pixels = generator.integers(0, 120, (number, *size, 3), dtype=np.uint8)
    pixels[np.arange(number), :, :, labels] += 120
    return pixels, labels.tolist()


def encode(pixels):
    file = io.BytesIO()
    pillow.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_parquet(path, pixels, labels, columns=()):
    import pyarrow
    from pyarrow import parquet

    images = [{"bytes": encode(each), "path": None} for each in pixels]
    parquet.write_table(pyarrow.table({"image": images, "label": labels, **dict(columns)}), path)
    return str(path)


def write_folder(path, pixels, labels):
    for number, (each, label) in enumerate(zip(pixels, labels, strict=True)):
        (path / NAMES[label]).mkdir(parents=True, exist_ok=True)
        (path / NAMES[label] / f"{number:03}.png").write_bytes(encode(each))
    return str(path)


def make_data(tmp_path, train, **arguments):
    return ImageDataModule(train, **{"batch_size": 8, "cache_dir": str(tmp_path / "cache"), **arguments})


def test_images_and_labels_are_those_of_the_file(tmp_path):
    pixels, labels = make_images(30)
    data = make_data(tmp_path, write_parquet(tmp_path / "a.parquet", pixels, labels), val_fraction=0.2)
    assert len(data.train_data) == 24
    whole = data.train_data.dataset
    for index in (0, 7, 29):
        image, label = whole[index]
        assert torch.equal(image, torch.from_numpy(pixels[index]).permute(2, 0, 1))
        assert int(label) == labels[index]
    assert set(data.train_data.indices) | set(data.val_data.indices) == set(range(30))
    assert data.val_data.indices == make_data(tmp_path, data.train, val_fraction=0.2, seed=5).val_data.indices
    assert len({label for _, label in (whole[i] for i in data.val_data.indices)}) > 1
    assert torch.equal(pickle.loads(pickle.dumps(whole))[3][0], whole[3][0])


def test_validation_images_are_normalised_and_left_as_they_are(tmp_path):
    pixels, labels = make_images(20)
    train = write_parquet(tmp_path / "a.parquet", pixels, labels)
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    data = make_data(tmp_path, train, validation=train, mean=mean, std=std)
    batches = list(data.val_dataloader())
    assert [len(batch[0]) for batch in batches] == [8, 8, 4]
    images = torch.cat([batch[0] for batch in batches])
    expected = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(
        std
    )[:, None, None]
    assert torch.allclose(images, expected, atol=1e-6)
    assert torch.cat([batch[1] for batch in batches]).tolist() == labels


def test_folders_names_and_numbers_are_the_same_classes(tmp_path):
    pixels, labels = make_images(24)
    by_number = make_data(tmp_path, write_parquet(tmp_path / "a.parquet", pixels, labels))
    names = [NAMES[label] for label in labels]
    by_name = make_data(tmp_path, write_parquet(tmp_path / "b.parquet", pixels, names))
    assert by_name.data_hash == by_number.data_hash
    folder = make_data(tmp_path, write_folder(tmp_path / "images", pixels, labels))
    found = sorted(int(label) for _, label in folder.train_data.dataset)
    assert found == sorted(labels)


def test_images_are_decoded_once(tmp_path, monkeypatch):
    pixels, labels = make_images(20)
    train = write_parquet(tmp_path / "a.parquet", pixels, labels)
    hashed = make_data(tmp_path, train).data_hash

    def decode(*_, **__):
        raise RuntimeError("decoded again")

    decode.__qualname__ = "decode"  # by which the cache knows it
    monkeypatch.setattr("lightning_qat.tasks.images.decode", decode)
    assert make_data(tmp_path, train, batch_size=4).data_hash == hashed
    with pytest.raises(RuntimeError, match="decoded again"):
        make_data(tmp_path, train, image_size=6).setup("fit")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_seeds_give_the_same_order_and_augmentation(num_workers, tmp_path):
    pixels, labels = make_images(40)
    train = write_parquet(tmp_path / "a.parquet", pixels, labels)

    def epochs(seed):
        torch.manual_seed(seed)
        loader = make_data(tmp_path, train, seed=seed, num_workers=num_workers, shift=2).train_dataloader()
        return [torch.cat([images for images, _ in loader]) for _ in range(2)]

    first = epochs(0)
    assert all(map(torch.equal, first, epochs(0)))
    assert not torch.equal(first[0], epochs(1)[0])
    assert not torch.equal(*first)


def test_flips_and_shifts_move_every_image_by_its_own_amount():
    torch.manual_seed(0)
    images = torch.arange(1.0, 26.0).view(1, 1, 5, 5).repeat(400, 1, 1, 1)
    shifted = shift_images(images, 1)
    padded = torch.nn.functional.pad(images[:1], (1,) * 4)[0, 0]
    windows = {tuple(padded[i : i + 5, j : j + 5].flatten().tolist()) for i in range(3) for j in range(3)}
    assert {tuple(each.flatten().tolist()) for each in shifted} == windows
    sample = (torch.arange(75, dtype=torch.uint8).view(3, 5, 5), torch.tensor(1))
    batch, _ = ImageBatch((0.0,) * 3, (1.0,) * 3, flip=True, shift=0)([sample] * 400)
    flipped = (batch[:, 0, 0, 0] > batch[:, 0, 0, 4]).float().mean()
    assert 0.4 < flipped < 0.6
    assert torch.equal(shift_images(images, 0), images)


def test_images_of_other_sizes_and_colors(tmp_path):
    small, labels = make_images(6)
    large, _ = make_images(6, (12, 20))
    train = write_parquet(tmp_path / "a.parquet", [*small, *large], labels * 2)
    data = make_data(tmp_path, train, image_size=10, mean=[0.5], std=[0.5], batch_size=4)
    images, _ = next(iter(data.train_dataloader()))
    assert images.shape == (4, 1, 10, 10)
    with pytest.raises(ValueError, match=r"sizes \(8, 8\) and \(20, 12\) \(width, height\): give image_size="):
        make_data(tmp_path, train).setup("fit")


def test_what_cannot_work_is_refused_with_the_remedy(tmp_path):
    pixels, labels = make_images(12)
    train = write_parquet(tmp_path / "a.parquet", pixels, labels, {"labels": labels})
    good = write_parquet(tmp_path / "b.parquet", pixels, [NAMES[label] for label in labels])
    other = write_parquet(tmp_path / "c.parquet", pixels, ["dog"] * 12)
    unlabelled = write_parquet(tmp_path / "d.parquet", pixels, [-1] * 12)
    fractions = write_parquet(tmp_path / "e.parquet", pixels, [0.5] * 12)
    text = tmp_path / "t.csv"
    text.write_text("label\n1\n2\n")
    cases = [
        ({"train": train}, r"Which of .* are the labels\? Name the column: label_column="),
        ({"train": train, "label_column": "class"}, "no column 'class'.*label_column="),
        ({"train": good, "image_column": "picture"}, "no column 'picture'.*image_column="),
        ({"train": str(text)}, r"None of .'label'. hold images. Name one: image_column="),
        ({"train": good, "validation": other}, r"no training images of the classes \['dog'\]"),
        ({"train": unlabelled}, "12 of 12 images have no label"),
        ({"train": fractions}, "holds no classes"),
        ({"train": good, "mean": [0.5]}, "must both have one number, or three"),
        ({"train": good, "val_fraction": 0.0}, "Give a share between 0 and 1"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            make_data(tmp_path, **arguments).setup("fit")


def test_a_network_trains_quantized_and_is_scored(tmp_path):
    pixels, labels = make_images(120)
    data = make_data(tmp_path, write_parquet(tmp_path / "a.parquet", pixels, labels), shift=1, val_fraction=0.25)
    assert len(data.val_data) % 8  # the last batch is short
    task = ImageClassificationTask(load_image_model("cifar_resnet8", 3), num_classes=3, lr=0.05, warmup_steps=0)
    qat = QATCallback("w4a8", ignore=["model.conv1", "linear"], batch_norm=4)
    ptq = PTQCallback(("rtn", "gptq"), calibration_samples=32, results=tmp_path / "ptq.jsonl")
    trainer = make_trainer(qat, ptq, max_epochs=4, check_val_every_n_epoch=4)
    trainer.fit(task, datamodule=data)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert metrics["val/accuracy"] > 0.8
    assert metrics["ptq_of_latent/gptq_w4/val/accuracy"] > 0.6
    assert len(quantized_layers(task)) == 6
    images, truth = (torch.cat(part) for part in zip(*data.val_dataloader(), strict=True))
    task.eval()
    with torch.no_grad():
        right = (task(images).argmax(1) == truth).float().mean()
    assert metrics["val/accuracy"] == pytest.approx(float(right), abs=1e-6)
    assert isinstance(data.val_data, Subset)


def test_models_by_name(tmp_path, monkeypatch):
    safetensors = pytest.importorskip("safetensors.torch")
    model = load_image_model("cifar_resnet8", 3)
    safetensors.save_file(model.state_dict(), tmp_path / "weights.safetensors")
    again = load_image_model("cifar_resnet8", 3, weights=str(tmp_path / "weights.safetensors"))
    assert torch.equal(again.linear.weight, model.linear.weight)
    with pytest.raises(ValueError, match="does not fit 'cifar_resnet8' with 4 classes"):
        load_image_model("cifar_resnet8", 4, weights=str(tmp_path / "weights.safetensors"))
    with pytest.raises(FileNotFoundError):
        load_image_model(weights="nowhere.safetensors")
    with pytest.raises(ValueError, match=r"the depth must be 6 n \+ 2"):
        load_image_model("cifar_resnet18")
    with pytest.raises(ValueError, match="Give weights="):
        load_image_model(pretrained=True)
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ImportError, match=r"resnet50.*needs timm: pip install timm"):
        load_image_model("resnet50")
    with pytest.raises(ValueError, match="Give task and model the same num_classes"):
        ImageClassificationTask(model, num_classes=5)._logits(torch.zeros(1, 3, 8, 8))


def test_models_of_timm(tmp_path):
    pytest.importorskip("timm", reason="timm is not installed")
    assert load_image_model("resnet18", 3)(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    with pytest.raises(ValueError, match="timm has no model 'resnet1'"):
        load_image_model("resnet1")
