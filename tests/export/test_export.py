"""What was trained is what is written and read back: codes, weights and outputs, to the bit."""

import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from lightning_qat import QATCallback, export, load_exported, load_qat, quantize_model, quantized_weights
from lightning_qat.exporters import EXPORTERS
from lightning_qat.exporters.bit_packing import pack, unpack
from lightning_qat.nn import prepare
from tests.callbacks.test_checkpoints import StepCheckpoint
from tests.helpers import TinyTask, batch_at, fit

SCHEMES = [
    "w8",
    "w4g16",
    "w4g16-asym",
    "w3",
    "w3g16-bf16",
    "w2g8-nozero",
    "w2",
    "w1.58",
    "w1",
    "w4-tensor",
    "w4g12-pad-fp16",
]
SCHEMES += ["w5g16", "w4g16-signed_max"]


@given(st.data())
def test_packed_codes_come_back(data):
    num_bits = data.draw(st.integers(1, 8))
    shape = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 40)))
    qmin = -(2 ** (num_bits - 1))
    codes = torch.randint(
        qmin, -qmin or 1, shape, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    )
    packed = pack(codes.to(torch.int8), qmin, num_bits)
    assert packed.shape == (shape[0], -(-shape[1] * num_bits // 8))
    assert torch.equal(unpack(packed, qmin, num_bits, shape[1]), codes.to(torch.int8))


class Net(nn.Module):
    """Every kind of layer, and a weight that two of them share."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(24, 16)
        self.conv, self.norm = nn.Conv1d(16, 32, 3, padding=1), nn.BatchNorm1d(32)
        self.linear, self.head = nn.Linear(32, 16), nn.Linear(16, 24, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.norm(self.conv(self.embed(tokens).transpose(1, 2)))
        return self.head(self.linear(torch.relu(x).transpose(1, 2)))


TOKENS = torch.arange(24).view(2, 12)
RULES = [{"target": "Conv1d"}, {"target": "Linear"}, {"target": "embed"}, {"target": "head"}]


def make(scheme):
    """Return a model of which all is quantized, the weight that is shared, too."""
    model = Net().eval()
    prepare(model, [{**rule, "scheme": scheme} for rule in RULES])
    return model


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("format", EXPORTERS)
def test_the_plain_model_computes_what_the_quantized_one_did(format, scheme, tmp_path):
    model = make(scheme)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    export(model, tmp_path / "out", format)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    loaded = load_exported(Net().eval(), tmp_path / "out")
    assert type(loaded.linear) is nn.Linear
    assert loaded.head.weight is loaded.embed.weight
    assert torch.equal(loaded(TOKENS), model(TOKENS))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_codes_scales_and_zero_points_come_back(scheme, tmp_path):
    model = make(scheme)
    manifest = export(model, tmp_path / "out")
    found, _ = EXPORTERS["safetensors"]().read(tmp_path / "out")
    expected = quantized_weights(model)
    assert set(found) == {"embed", "conv", "linear"}
    for name, weight in found.items():
        assert torch.equal(weight.codes, expected[name].codes)
        assert torch.equal(weight.params.scale, expected[name].params.scale)
        assert weight.scheme == expected[name].scheme
        zero_point = expected[name].params.zero_point
        assert zero_point is None or torch.equal(weight.params.zero_point, zero_point)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    parts = ("codes", "scale", "zero_point")
    stored = sum(t.numel() * t.element_size() for name, t in tensors.items() if name.rpartition(".")[2] in parts)
    assert manifest["stored_bits"] == 8 * stored / sum(weight.codes.numel() for weight in found.values())


def test_an_exported_checkpoint_scores_as_it_did(tmp_path):
    task = TinyTask()
    saver = StepCheckpoint(tmp_path, [8])
    fit(task, QATCallback("w3g16", scale_lr=1e-2, observer="mse"), saver, max_steps=8)
    trained = load_qat(TinyTask(), saver.path(8)).eval()
    export(trained, tmp_path / "out", metrics={"loss": 1.5}, source=saver.path(8))
    loaded = load_exported(TinyTask(), tmp_path / "out").eval()
    assert torch.equal(loaded(batch_at(3)), trained(batch_at(3)))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["schemes"] == {"w3g16": 2}
    assert manifest["metrics"] == {"loss": 1.5}
    assert len(manifest["source_sha256"]) == 64
    assert "w3g16 (2 layers)" in (tmp_path / "out" / "MODEL_CARD.md").read_text()


@pytest.mark.parametrize("method", ["rtn", "awq", "gptq"])
def test_results_of_quantization_after_training_are_exported(method, tmp_path):
    model = TinyTask().eval()
    results = quantize_model(model, [batch_at(1)], scheme="w4g16", methods=(method,), bits=(4,))
    quantized = results.apply(copy.deepcopy(model), method, 4)
    export(quantized, tmp_path / "out")
    assert torch.equal(load_exported(TinyTask(), tmp_path / "out").eval()(batch_at(3)), quantized(batch_at(3)))


def test_half_precision_models_keep_their_dtype(tmp_path):
    model = TinyTask().to(torch.bfloat16).eval()
    prepare(model, "w4g16")
    export(model, tmp_path / "out")
    loaded = load_exported(TinyTask().to(torch.bfloat16).eval(), tmp_path / "out")
    x = batch_at(3).bfloat16()
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("damage", ["cut off", "altered", "missing", "manifest"])
def test_damaged_exports_are_noticed_and_the_module_is_left_alone(damage, tmp_path):
    model = TinyTask()
    prepare(model, "w4g16")
    export(model, tmp_path / "out")
    path = tmp_path / "out" / ("manifest.json" if damage == "manifest" else "model.safetensors")
    content = bytearray(path.read_bytes())
    if damage == "altered":
        content[-3] ^= 1
    path.write_bytes(content[: len(content) // 2] if damage in ("cut off", "manifest") else content)
    if damage == "missing":
        path.unlink()
    module = TinyTask(seed=1)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match="is damaged" if damage == "manifest" else "is (missing|cut off or altered)"):
        load_exported(module, tmp_path / "out")
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_what_cannot_be_exported_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Nothing in the model is quantized"):
        export(TinyTask(), tmp_path / "out")
    model = TinyTask()
    prepare(model, "w4a8")
    with pytest.raises(ValueError, match=r"cannot hold w4a8 of net.0: .*inputs"):
        export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    model = TinyTask()
    prepare(model, "w4")
    with pytest.raises(ValueError, match="safetensors"):
        export(model, tmp_path / "out", "gguff")
    export(model, tmp_path / "out")
    with pytest.raises(FileExistsError, match="Give a new folder"):
        export(model, tmp_path / "out")
    with pytest.raises(ValueError, match=r"no layer 'net.0'"):
        load_exported(nn.Linear(2, 2), tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"no manifest.json"):
        load_exported(TinyTask(), tmp_path)
