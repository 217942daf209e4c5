"""Quantization after training of pretrained models on real inputs; they are no part of the project."""

import copy
import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lightning_qat import quantize_model, restore_float
from lightning_qat.ptq import GPTQ
from lightning_qat.tasks.cifar_resnet import CifarResNet

DATA = Path(os.environ.get("LIGHTNING_QAT_DATA", Path(__file__).parents[2] / "shared" / "data"))
BITS = (8, 4, 3, 2)


def folder(name):
    if not (DATA / name).is_dir():
        pytest.skip(f"there is no {DATA / name}; LIGHTNING_QAT_DATA names the folder that holds it")
    return DATA / name


def images(path, number):
    """Return the first images ``[N, 3, 32, 32]``, normalised, and their labels."""
    parquet, pillow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("PIL.Image")
    batch = next(parquet.ParquetFile(path).iter_batches(number)).to_pydict()
    pixels = [np.asarray(pillow.open(io.BytesIO(image["bytes"]))) for image in batch["image"]]
    x = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (x - mean[:, None, None]) / std[:, None, None], torch.tensor(batch["label"])


@pytest.fixture(scope="module")
def llama():
    path = folder("stories260k")
    model = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(path).eval()
    rows = torch.from_numpy(np.load(path / "generated_train.npy").astype(np.int64))[:96]
    batches = [{"input_ids": batch} for batch in rows.split(32)]
    stream = torch.from_numpy(np.load(path / "tinystories_dev.npy").astype(np.int64))
    return model, batches, stream[: 64 * 256].view(64, 256)


@pytest.fixture(scope="module")
def resnet():
    path = folder("cifar10-jpeg")
    model = CifarResNet()
    model.load_state_dict(pytest.importorskip("safetensors.torch").load_file(path / "resnet20.safetensors"))
    x, _ = images(path / "train.parquet", 256)
    return model.eval(), list(x.split(64)), images(path / "test.parquet", 512)


def nll(model, rows):
    with torch.no_grad():
        logits = model(rows).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item()


def accuracy(model, images_and_labels):
    x, labels = images_and_labels
    with torch.no_grad():
        return (model(x).argmax(1) == labels).float().mean().item()


def score_all(model, results, score):
    scores = {}
    for method, bits in results.weights:
        twin = copy.deepcopy(model)
        restore_float(results.apply(twin, method, bits))
        scores[method, bits] = score(twin)
    return scores


@pytest.mark.parametrize("scheme", ["w2", "w2-nozero", "w2-asym"])
@pytest.mark.parametrize("name", ["llama", "resnet"])
def test_methods_seldom_do_worse_than_rounding_to_nearest(name, scheme, request):
    """By their own raw results, before any is replaced."""
    model, batches, _ = request.getfixturevalue(name)
    methods = ("imatrix", "awq", "gptq")
    results = quantize_model(model, batches, methods=methods, bits=BITS, scheme=scheme, progress=False)
    for method in methods:
        reports = [report for report in results.reports if report.method == method]
        worse = [report for report in reports if not report.raw_error <= report.rtn_error]
        assert worse == results.fallbacks(method)
        assert len(worse) <= 0.02 * len(reports)


def test_a_pretrained_llama(llama):
    model, batches, rows = llama
    methods = {"rtn": "rtn", "imatrix": "imatrix", "awq": "awq", "gptq": "gptq", "minmax": GPTQ(search=None)}
    results = quantize_model(model, batches, methods=methods, bits=BITS, progress=False)
    scores = score_all(model, results, lambda twin: nll(twin, rows))
    reference = nll(model, rows)
    for bits in (4, 3):
        assert reference < scores["gptq", bits] < scores["awq", bits] < scores["imatrix", bits] < scores["rtn", bits]
        assert scores["gptq", bits] < scores["minmax", bits] < scores["rtn", bits]
    assert scores["gptq", 2] < scores["awq", 2] < scores["rtn", 2]
    assert all(abs(scores[method, 8] - reference) < 0.002 for method in methods)
    sequential = quantize_model(model, batches, methods="gptq", bits=2, sequential=True, progress=False)
    assert sequential.calibration.procedure == "by block replay"
    assert score_all(model, sequential, lambda twin: nll(twin, rows))["gptq", 2] < scores["gptq", 2] - 0.05


def test_a_pretrained_resnet(resnet):
    model, batches, data = resnet
    arguments = {"bits": (4, 3, 2), "ignore": ["conv1", "linear"], "progress": False}
    methods = {"rtn": "rtn", "gptq": "gptq", "searched": GPTQ(search_convolutions=True), "minmax": GPTQ(search=None)}
    results = quantize_model(model, batches, methods=methods, **arguments)
    scores = score_all(model, results, lambda twin: accuracy(twin, data))
    assert accuracy(model, data) > 0.78
    assert scores["rtn", 2] + 0.1 < scores["searched", 2] < scores["gptq", 2] - 0.1
    assert all(scores["gptq", bits] == scores["minmax", bits] for bits in (4, 3, 2))
    assert scores["gptq", 3] > accuracy(model, data) - 0.03
    sequential = quantize_model(model, batches, methods="gptq", sequential=True, **arguments)
    assert sequential.calibration.procedure == "by block replay"
