"""Fake-quantized layers, each against the float layer with a weight that was quantized by hand."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_qat import prepare, quantized_weights, restore_float
from lightning_qat.core import QuantScheme, dequantize, fake_quantize, quantize
from lightning_qat.estimators import ClippedSTE
from lightning_qat.nn import quantized_layers, set_num_bits
from lightning_qat.observers import MinMaxObserver, MSEObserver

LAYERS = {
    "linear": (lambda: nn.Linear(32, 12), (4, 5, 32)),
    "linear without bias": (lambda: nn.Linear(32, 12, bias=False), (4, 32)),
    "conv1d": (lambda: nn.Conv1d(8, 12, 3, stride=2, padding=1), (2, 8, 16)),
    "conv2d": (lambda: nn.Conv2d(8, 12, 3, padding=1, groups=2), (2, 8, 7, 9)),
    "conv2d depthwise": (lambda: nn.Conv2d(8, 8, 4, groups=8), (2, 8, 7, 9)),
    "conv2d circular": (lambda: nn.Conv2d(8, 12, 3, padding=1, padding_mode="circular", dilation=2), (2, 8, 7, 9)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2), (2, 4, 5, 6, 7)),
    "embedding": (lambda: nn.Embedding(20, 32, padding_idx=3), None),
    "hf conv1d": (lambda: pytest.importorskip("transformers.pytorch_utils").Conv1D(12, 32), (4, 5, 32)),
}


def make(name):
    build, shape = LAYERS[name]
    model = nn.Sequential(build())
    x = torch.randint(0, 20, (4, 6)) if shape is None else torch.randn(shape)
    return model, x


def rules(name, scheme):
    return [{"target": "Embedding" if name == "embedding" else "*", "scheme": scheme}]


def matrix(name, weight):
    return weight.t() if name == "hf conv1d" else weight.flatten(1)


def by_hand(name, layer, scheme):
    """Return a float copy of ``layer`` whose weight went through integer codes."""
    copied = copy.deepcopy(layer)
    weight = matrix(name, copied.weight.detach())
    params = MinMaxObserver()(weight, scheme)
    restored = dequantize(quantize(weight, params, scheme), params, scheme)
    with torch.no_grad():
        matrix(name, copied.weight).copy_(restored) if name == "hf conv1d" else copied.weight.copy_(
            restored.view_as(copied.weight)
        )
    return copied


@pytest.mark.parametrize("text", ["w4", "w2g16-nozero-pad", "w3-tensor", "w4g8-asym-pad"])
@pytest.mark.parametrize("name", LAYERS)
def test_output_and_gradients_equal_those_of_the_dequantized_weight(name, text):
    model, x = make(name)
    reference = by_hand(name, model[0], QuantScheme.parse(text))
    prepare(model, rules(name, text))
    output, expected = model(x), reference(x)
    assert torch.equal(output, expected)
    output.square().sum().backward()
    expected.square().sum().backward()
    assert torch.allclose(model[0].weight.grad, reference.weight.grad, rtol=1e-5, atol=1e-6)
    if getattr(reference, "bias", None) is not None:
        assert torch.equal(model[0].bias.grad, reference.bias.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("observer", [MinMaxObserver(), MSEObserver(num_steps=5)], ids=["minmax", "mse"])
@pytest.mark.parametrize("name", LAYERS)
def test_fake_quantized_weight_is_the_dequantized_one_to_the_bit(name, observer, dtype):
    model, _ = make(name)
    model.to(dtype)
    prepare(model, rules(name, "w3g16-pad"), observer=observer)
    deployed = quantized_weights(model)["0"]
    assert deployed.codes.dtype == torch.int8
    assert torch.equal(matrix(name, model[0].fake_quantized_weight()), deployed.dequantize().to(dtype))


@pytest.mark.parametrize("text", ["w8a8", "w4a4", "w4a8-actsym"])
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "embedding"])
def test_inputs_are_quantized_by_their_own_range(name, text):
    model, x = make(name)
    scheme = QuantScheme.parse(text)
    reference = by_hand(name, model[0], scheme)
    is_conv = isinstance(model[0], nn.modules.conv._ConvNd)
    rows = x.flatten(1) if is_conv else x.reshape(-1, x.shape[-1])  # a convolution sums over all but the batch
    params = MinMaxObserver()(rows, scheme.activation)
    quantized = fake_quantize(rows, params, scheme.activation).reshape(x.shape)
    prepare(model, text)
    assert torch.equal(model(x), reference(quantized))
    x.requires_grad_()
    model(x).sum().backward()
    assert torch.isfinite(x.grad).all()
    assert x.grad.abs().sum() > 0


def test_a_batch_without_rows_and_an_unbatched_input_pass():
    model = nn.Sequential(nn.Linear(32, 12))
    prepare(model, "w4a8")
    assert model(torch.zeros(0, 32)).shape == (0, 12)
    assert model(torch.randn(32)).shape == (12,)


@pytest.mark.parametrize("name", LAYERS)
def test_swap_out_restores_the_exact_original(name):
    model, x = make(name)
    original, weight, keys = type(model[0]), model[0].weight, list(model.state_dict())
    attributes, expected = set(vars(model[0])), model(x)
    prepare(model, rules(name, "w4"))
    assert type(model[0]) is not original
    assert isinstance(model[0], original)
    assert model[0].weight is weight
    restore_float(model)
    assert type(model[0]) is original
    assert set(vars(model[0])) == attributes
    assert list(model.state_dict()) == keys
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("name", LAYERS)
def test_deepcopy_and_pickle(name):
    model, x = make(name)
    prepare(model, rules(name, "w4"), learn_scales=True)
    set_num_bits(model, 8)
    expected = model(x)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(x), expected)
        assert copied[0].weight_fake_quant.num_bits == 8
        assert copied[0].weight_fake_quant is not model[0].weight_fake_quant


def test_the_grid_stays_in_float32_when_the_model_changes_dtype():
    model = nn.Sequential(nn.Linear(32, 12))
    prepare(model, "w4g16", learn_scales=True)
    quantizer = model[0].weight_fake_quant
    model(torch.randn(2, 32))
    scale = quantizer.scale.clone()
    model.bfloat16()
    assert model[0].weight.dtype == torch.bfloat16
    assert torch.equal(quantizer.scale, scale)
    assert quantizer.log_scale_ratio.dtype == torch.float32
    assert quantizer.levels.qmin.dtype == torch.float32
    assert model(torch.randn(2, 32).bfloat16()).dtype == torch.bfloat16


def test_bits_change_without_a_new_graph():
    from torch._dynamo.testing import CompileCounter

    for text in ("w2g16", "w2g16-nozero", "w2a8", "w2-asym"):
        torch._dynamo.reset()
        model = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8))
        prepare(model, text)
        counter, x = CompileCounter(), torch.randn(4, 32)
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        for bits in (16, 8, 4, 3, 2):
            set_num_bits(model, bits)
            assert torch.equal(compiled(x), model(x))
            assert {layer.weight_fake_quant.num_bits for layer in quantized_layers(model).values()} == {bits}
        assert counter.frame_count == 1


def test_pass_through_is_the_float_layer_to_the_bit():
    model, x = make("linear")
    expected = model(x)
    prepare(model, "w2a8", learn_scales=True)
    set_num_bits(model, 16)
    output = model(x)
    assert torch.equal(output, expected)
    output.sum().backward()
    assert torch.count_nonzero(model[0].weight_fake_quant.log_scale_ratio.grad) == 0  # in the graph, for DDP
    with pytest.raises(ValueError, match="0: The weight is not quantized yet"):
        quantized_weights(model)


def test_learned_scales_start_at_the_observed_grid_and_stay_positive():
    model, x = make("linear")
    reference = by_hand("linear", model[0], QuantScheme.parse("w4"))
    prepare(model, "w4", learn_scales=True)
    assert torch.equal(model(x), reference(x))
    quantizer = model[0].weight_fake_quant
    with torch.no_grad():
        quantizer.log_scale_ratio.fill_(-100.0)
    assert (quantizer.qparams(model[0].weight).scale > 0).all()


def test_quantized_weights_of_a_float_model_are_refused():
    with pytest.raises(ValueError, match=r"no fake-quantized layers. Load a checkpoint .* by load_qat"):
        quantized_weights(nn.Linear(8, 8))


def test_observer_and_estimator_may_be_named():
    model = nn.Sequential(nn.Linear(32, 8))
    prepare(model, "w4", observer={"name": "mse", "num_steps": 7}, estimator="ste")
    assert model[0].weight_fake_quant.config.observer == MSEObserver(num_steps=7)


def test_padding_rows_of_an_embedding_get_no_gradient():
    model, _ = make("embedding")
    prepare(model, rules("embedding", "w4"))
    model(torch.tensor([[3, 4, 3]])).sum().backward()
    assert (model[0].weight.grad[3] == 0).all()
    assert torch.allclose(model[0].weight.grad[4], torch.ones(32))


def test_codes_do_not_change_with_the_model():
    model = nn.Sequential(nn.Linear(8, 8))
    prepare(model, "w4-asym", observer="mse")
    result = quantized_weights(model)["0"]
    expected = result.dequantize()
    with torch.no_grad():
        model[0].weight *= 2
    model[0].weight_fake_quant.observe(model[0].weight)
    assert torch.equal(result.dequantize(), expected)


def test_freezing_a_stale_grid_finds_it_first():
    model = nn.Sequential(nn.Linear(8, 8))
    prepare(model, "w4", observer="mse")
    model[0].weight_fake_quant.freeze(model[0].weight)
    assert torch.equal(model[0].weight_fake_quant.scale, MSEObserver()(model[0].weight, QuantScheme(4)).scale[:, 0])


def test_another_estimator_replaces_that_of_the_inputs():
    model = nn.Sequential(nn.Linear(8, 8))
    prepare(model, "w4a8")
    prepare(model, "w4a8", estimator=ClippedSTE(margin=0.0))
    assert model[0].input_fake_quant.estimator == ClippedSTE(margin=0.0)


def test_meta_grids_take_what_is_loaded():
    model = nn.Sequential(nn.Linear(8, 8))
    prepare(model, "w4-asym", observer="mse")
    expected, state = quantized_weights(model)["0"], model.state_dict()
    with torch.device("meta"):
        other = nn.Sequential(nn.Linear(8, 8))
    prepare(other, "w4-asym", observer="mse")
    other.load_state_dict(state, assign=True)
    assert torch.equal(other[0].weight_fake_quant.scale, model[0].weight_fake_quant.scale)
    assert torch.equal(other[0].weight_fake_quant.zero_point, expected.params.zero_point[:, 0])


def test_descriptions_are_one_line():
    model = nn.Sequential(nn.Linear(32, 8))
    plan = prepare(model, "w4a8")
    assert repr(plan.layers[0]) == "PlannedLayer('0', Linear, w4a8)"
    assert repr(quantized_weights(model)) == "{'0': QuantizedWeight(8 x 32, w4)}"
    set_num_bits(model, 8)
    assert "(weight_fake_quant): WeightFakeQuantize(w4, now at 8 bits)" in repr(model)


def test_grids_follow_the_module_and_are_found_anew_after_meta():
    model = nn.Sequential(nn.Linear(8, 8))
    prepare(model, "w4-asym", observer="mse")
    expected = quantized_weights(model)["0"]
    weight = model[0].weight.detach().clone()
    model.to("meta")
    assert model[0].weight_fake_quant.scale.is_meta
    model.to_empty(device="cpu")
    model.load_state_dict({"0.weight": weight, "0.bias": torch.zeros(8)}, assign=True)
    found = quantized_weights(model)["0"]
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.params.zero_point, expected.params.zero_point)


def test_transformer_encoder_layers_do_not_bypass_the_quantizers():
    """In evaluation, PyTorch's fused path would use the float weights of linear1 and linear2."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    model, x = nn.Sequential(layer), torch.randn(2, 5, 16)
    with torch.no_grad():
        expected = model(x)
        plan = prepare(model, "w2")
        assert "MultiheadAttention" in plan.skipped["0.self_attn.out_proj"]
        quantized = model(x)
        assert not torch.allclose(quantized, expected, atol=1e-2)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            assert torch.allclose(model(x), quantized)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
        restore_float(model)
        assert torch.equal(model(x), expected)
        assert layer.activation_relu_or_gelu == 1
