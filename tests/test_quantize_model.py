"""quantize_model on models of every kind."""

import copy

import pytest
import torch
from torch import nn

from lightning_qat import quantize_model, quantized_weights, restore_float
from lightning_qat.core import QuantScheme, fake_quantize
from lightning_qat.nn import quantized_layers
from lightning_qat.observers import MinMaxObserver


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
            nn.Conv2d(channels, channels, 1),
        )

    def forward(self, x):
        return torch.relu(x + self.body(x))


class Experts(nn.Module):
    """Each row goes to one of four experts."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        choice = (x[:, 0] * 10).long().abs() % 4
        return torch.cat([expert(x[choice == index]) for index, expert in enumerate(self.experts)])


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


class Reused(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(torch.relu(self.linear(x)))


def hugging_face(name):
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16}
    if name == "gpt2":
        config = transformers.GPT2Config(vocab_size=32, n_layer=2, n_head=2, n_embd=16, n_positions=32)
        return transformers.GPT2LMHeadModel(config)
    if name == "bert":
        config = transformers.BertConfig(**small, intermediate_size=24, max_position_embeddings=32)
        return transformers.BertForSequenceClassification(config)
    config = transformers.LlamaConfig(**small, intermediate_size=24, num_key_value_heads=1, tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(config)


def token_batches():
    mask = torch.ones(4, 12, dtype=torch.long)
    mask[1, 7:] = 0
    return [{"input_ids": torch.randint(0, 32, (4, 12)), "attention_mask": mask} for _ in range(3)]


MODELS = {
    "resnet": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), Residual(8), Residual(8), nn.Flatten(), nn.Linear(288, 4)),
               lambda: [torch.randn(size, 3, 8, 8) for size in (4, 4, 1)]),
    "experts": (Experts, lambda: [torch.randn(64, 8)]),
    "tied": (Tied, lambda: [torch.randn(16, 8)]),
    "reused": (Reused, lambda: [torch.randn(16, 8)]),
    "gpt2": (lambda: hugging_face("gpt2"), token_batches),
    "bert": (lambda: hugging_face("bert"), token_batches),
    "llama": (lambda: hugging_face("llama"), token_batches),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_every_method_works_on_every_kind_of_model(name):
    torch.manual_seed(0)
    build, make_batches = MODELS[name]
    model = build().eval()
    before = snapshot(model)
    bits = (8, 4, 3, 2)
    results = quantize_model(
        model, make_batches(), methods=("rtn", "imatrix", "awq", "gptq"), bits=bits, progress=False
    )
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not quantized_layers(model)
    assert set(results.weights) == {(method, b) for method in ("rtn", "imatrix", "awq", "gptq") for b in bits}
    num_weights = len({layer.weight for layer in results.plan.layers})
    assert len(results.reports) == num_weights * 16
    assert len([r for r in results.fallbacks() if r.method != "imatrix"]) <= 0.02 * len(results.reports)
    for method in ("awq", "gptq"):
        copied = copy.deepcopy(model)
        results.apply(copied, method, 3)
        restore_float(copied)
        assert type(copied) is type(model)
        for layer in results.plan.layers:
            weight = copied.get_submodule(layer.name).weight
            expected = results.weights[method, 3][layer.name].dequantize()
            assert torch.equal(layer.qat_class.to_matrix(weight), expected)


def test_the_model_is_calibrated_in_evaluation_mode_and_left_as_it_was():
    model = nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 8))
    model[1].eval()
    before = snapshot(model)
    first, second = (quantize_model(model, [torch.ones(4, 8)], methods="gptq", bits=4, progress=False) for _ in "ab")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [module.training for module in model] == [True, False, True]
    assert torch.equal(first.weights["gptq", 4]["2"].codes, second.weights["gptq", 4]["2"].codes)


def test_a_total_error_ranks_the_methods():
    torch.manual_seed(0)
    model = MODELS["llama"][0]().eval()
    results = quantize_model(model, token_batches(), methods=("rtn", "imatrix", "gptq"), bits=3, progress=False)
    total = {
        method: sum(report.output_error for report in results.reports if report.method == method)
        for method in ("rtn", "imatrix", "gptq")
    }
    assert total["gptq"] < total["imatrix"] < total["rtn"]


def test_rtn_is_the_grid_and_needs_no_batches():
    model = nn.Sequential(nn.Linear(32, 8))
    results = quantize_model(model, [], methods="rtn", scheme="w2g16-nozero", bits=(4, 2), progress=False)
    for bits in (4, 2):
        scheme = QuantScheme.parse("w2g16-nozero").at(bits)
        weight = model[0].weight.detach()
        expected = fake_quantize(weight, MinMaxObserver()(weight, scheme), scheme)
        assert torch.equal(results.weights["rtn", bits]["0"].dequantize(), expected)
    assert results.calibration is None


def test_embeddings_are_rounded_to_nearest_and_said_so():
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8))
    rules = [{"target": "*", "scheme": "w4"}, {"target": "Embedding", "scheme": "w4"}]
    batches = [torch.randint(0, 10, (4, 6))]
    results = quantize_model(model, batches, methods=("gptq",), scheme=rules, progress=False)
    (report,) = results.fallbacks()
    assert (report.layer, report.fallback) == ("0", "its inputs are not known")
    assert set(results.weights["gptq", 4]) == {"0", "1"}


def test_layers_that_saw_no_token_are_an_error_or_rounded_to_nearest():
    model = nn.ModuleDict({"used": nn.Linear(8, 8), "idle": nn.Linear(8, 8)})
    arguments = {"step": model["used"], "methods": "gptq", "bits": 4, "progress": False}
    with pytest.raises(ValueError, match=r"No token reached idle during calibration.*unseen='rtn'"):
        quantize_model(model, [torch.randn(4, 8)], **arguments)
    results = quantize_model(model, [torch.randn(4, 8)], **arguments, unseen="rtn")
    assert [report.layer for report in results.fallbacks()] == ["idle"]


def test_inputs_are_quantized_as_the_scheme_says():
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(4, 8)
    results = quantize_model(model, [x], methods="gptq", scheme="w4a8", progress=False)
    results.apply(model, "gptq", 4)
    assert model[0].input_fake_quant.num_bits == 8
    assert torch.equal(model[0].weight, results.weights["gptq", 4]["0"].dequantize())
    assert not torch.equal(model(x), nn.functional.linear(x, model[0].weight, model[0].bias))


def test_codes_can_be_read_from_a_model_that_results_were_applied_to():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    results = quantize_model(model, [torch.randn(32, 8)], methods="awq", bits=3, progress=False)
    results.apply(model, "awq", 3)
    found = quantized_weights(model)
    assert found == results.weights["awq", 3]
    with torch.no_grad():
        model[0].weight += 1
    with pytest.raises(ValueError, match="0: The weight is not quantized yet"):
        quantized_weights(model)


def test_results_that_do_not_exist_or_fit_are_refused():
    model = nn.Sequential(nn.Linear(8, 8))
    results = quantize_model(model, [], methods="rtn", bits=(4, 3), progress=False)
    assert results.apply(model, "rtn", 4) is model
    with pytest.raises(ValueError, match=r"no result of 'gptq' at 3 bits; there are \('rtn', 4\), \('rtn', 3\)"):
        results.apply(model, "gptq", 3)
    with pytest.raises(ValueError, match="not the one that was quantized: it has no 0"):
        results.apply(nn.ModuleDict({"other": nn.Linear(8, 8)}), "rtn", 4)
    with pytest.raises(TypeError, match="several batches"):
        quantize_model(model, {"x": torch.randn(4, 8)}, bits=4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Give bits, such as"),
        ({"bits": ()}, "one or more different widths"),
        ({"bits": 16}, "one or more different widths"),
        ({"bits": (4, 4)}, "one or more different widths"),
        ({"bits": 3, "scheme": "w4"}, "bits=3 is narrower than the scheme, 4 bits"),
        ({"bits": 4, "methods": "gtpq"}, "no method 'gtpq'. Did you mean 'gptq'"),
        ({"bits": 4, "ignore": "nothing"}, "matches no module"),
        ({"scheme": "w4g3"}, "does not divide"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        quantize_model(nn.Sequential(nn.Linear(8, 8)), [torch.randn(4, 8)], progress=False, **arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"unseen": "skip"}, ValueError, "unseen='skip' must be 'error' or 'rtn'"),
        ({"memory_budget_gib": "4"}, TypeError, "memory_budget_gib='4' must be a number"),
        ({"memory_budget_gib": -1}, ValueError, "memory_budget_gib=-1 must be positive"),
        ({"batches": None}, TypeError, "got a NoneType"),
        ({"batches": 3}, TypeError, "got a int"),
        ({"batches": [[1.0, 2.0]]}, TypeError, "The layer '0' was called with a float, not with a tensor"),
        ({"model": nn.Linear}, TypeError, "model must be a Module"),
        ({"step": 3}, TypeError, "step=3 must be a function"),
        ({"methods": 4}, TypeError, "methods=4 must be names"),
        ({"methods": "rtn,gptq"}, ValueError, r"Give a tuple: \('rtn', 'gptq'\)"),
        ({"methods": ("GPTQ",)}, ValueError, "Did you mean 'gptq'"),
        ({"ignore": 3}, TypeError, "Expected patterns"),
        ({"mapping": "x"}, TypeError, "must map layer classes"),
    ],
)
def test_typical_mistakes_are_explained(change, error, message):
    arguments = {"model": nn.Sequential(nn.Linear(8, 8)), "batches": [torch.randn(4, 8)], "methods": "gptq", "bits": 4}
    with pytest.raises(error, match=message):
        quantize_model(**{**arguments, **change}, progress=False)


def test_a_model_with_fake_quantization_is_refused():
    model = nn.Sequential(nn.Linear(8, 8))
    results = quantize_model(model, [], methods="rtn", bits=4, progress=False)
    results.apply(model, "rtn", 4)
    with pytest.raises(ValueError, match="has fake quantization in it"):
        quantize_model(model, [], methods="rtn", bits=4, progress=False)


def test_a_typo_in_a_query_of_results_is_no_answer():
    results = quantize_model(nn.Sequential(nn.Linear(8, 8)), [], methods="rtn", bits=4, progress=False)
    assert repr(results) == "PTQResults(rtn at 4 bits, 1 layers, 0 fallbacks)"
    for query in (
        results.fallbacks,
        results.num_reports,
        results.calibration_of,
        lambda name: results.seconds(name, 4),
    ):
        with pytest.raises(ValueError, match="no result of 'gtpq'; there are rtn"):
            query("gtpq")
