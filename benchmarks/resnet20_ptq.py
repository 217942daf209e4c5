"""Quantization after training of a pretrained ResNet-20 on CIFAR-10: what each method and each choice of range gives.

The model and its data are not part of the project: set LIGHTNING_QAT_DATA to the folder that holds
``cifar10-jpeg/``. Usage: python benchmarks/resnet20_ptq.py [--images 10000] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import copy
import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import torch
from PIL import Image
from safetensors.torch import load_file
from shared import data_folder, publish, table
from torch import Tensor, nn

from lightning_qat import quantize_model, restore_float
from lightning_qat.ptq import AWQ, GPTQ, RTN, IMatrix
from lightning_qat.tasks.cifar_resnet import CifarResNet

METHODS = {
    "rtn": RTN(),
    "imatrix": IMatrix(),
    "awq": AWQ(),
    "gptq (searched ranges)": GPTQ(search_convolutions=True),
    "gptq": GPTQ(),
}
NUM_CALIBRATION = 512


def read_images(path: Path, number: int) -> tuple[Tensor, Tensor]:
    """Return the first images ``[N, 3, 32, 32]``, normalised as the model was trained, and their labels."""
    rows = next(parquet.ParquetFile(path).iter_batches(number)).to_pydict()
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(image["bytes"]))) for image in rows["image"]])
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    return (x - mean[:, None, None]) / std[:, None, None], torch.tensor(rows["label"])


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return top-1 accuracy in percent."""
    with torch.inference_mode():
        right = [(model(x).argmax(1) == y).sum() for x, y in zip(images.split(500), labels.split(500), strict=True)]
    return 100 * float(sum(right)) / len(labels)


def main() -> None:
    """Print every row, also those that lose, and write them down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10_000, help="test images")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "resnet20_ptq")
    arguments = parser.parse_args()
    folder = data_folder("cifar10-jpeg")
    model = CifarResNet().eval()
    model.load_state_dict(load_file(folder / "resnet20.safetensors"))
    calibration, _ = read_images(folder / "train.parquet", NUM_CALIBRATION)
    images, labels = read_images(folder / "test.parquet", arguments.images)

    scores: dict[tuple[str, str], float] = {}
    for sequential in (False, True):
        for scheme, bits in (("w2", (8, 4, 3, 2)), ("w2-nozero", (2,)), ("w2-asym", (2,))):
            results = quantize_model(
                model,
                list(calibration.split(64)),
                methods={name: method for name, method in METHODS.items() if not sequential or "gptq" in name},
                bits=bits,
                scheme=scheme,
                ignore=["conv1", "linear"],
                sequential=sequential,
            )
            print(f"{scheme}: {len(results.fallbacks())} of {len(results.reports)} fell back to rounding")
            for method, width in results.weights:
                twin = restore_in(results.apply(copy.deepcopy(model), method, width))
                column = f"{width:g}" if len(bits) > 1 else scheme.removeprefix("w").replace("-", " ")
                row = f"{method}, sequential" if sequential else method
                scores[row, column] = accuracy(twin, images, labels)
    report(arguments.out, accuracy(model, images, labels), scores, arguments.images)


def restore_in(model: nn.Module) -> nn.Module:
    """Return ``model`` without fake quantization."""
    restore_float(model)
    return model


def report(out: Path, reference: float, scores: dict[tuple[str, str], float], num_images: int) -> None:
    """Print the table and write it, with the conditions, beside the command."""
    columns = list(dict.fromkeys(column for _, column in scores))
    lines = [
        "# Quantization after training of ResNet-20",
        "",
        f"`python benchmarks/resnet20_ptq.py`. Top-1 accuracy in percent on {num_images:,} test images; weights only,",
        "symmetric unless said otherwise, per output channel, first convolution and classifier in float, BatchNorm as",
        f"trained; {NUM_CALIBRATION} training images for calibration. Float: {reference:.2f}. Nothing in it is random.",
        "",
        *table(scores, columns, 2),
    ]
    publish(out, lines)


if __name__ == "__main__":
    main()
