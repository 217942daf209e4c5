"""Which layers are quantized by which rule, and what is refused."""

import pytest
import torch
from torch import nn
from torchmetrics import Metric

from lightning_qat import prepare
from lightning_qat.core import QuantScheme
from lightning_qat.nn import QATLinear, make_plan, parse_rules, quantized_layers
from lightning_qat.nn.bits import BitReport, bit_report


class Model(nn.Module):
    """Embedding, two blocks and a head with a name of its own."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 32)
        self.blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(32, 64), "down": nn.Linear(64, 32)}) for _ in "ab")
        self.conv = nn.Conv1d(32, 32, 3)
        self.norm = nn.LayerNorm(32)
        self.rnn = nn.GRU(32, 32)
        self.lm_head = nn.Linear(32, 10)


def schemes(model, spec, **kwargs):
    plan = make_plan(model, parse_rules(spec), **kwargs)
    return {layer.name: str(layer.scheme) for layer in plan.layers}, plan.skipped


def test_defaults():
    chosen, skipped = schemes(Model(), "w4")
    assert set(chosen) == {"blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "conv"}
    assert skipped["embed"].startswith("embeddings stay in float (a rule with target 'embed'")
    assert skipped["lm_head"].startswith("the output head stays in float")
    assert skipped["rnn"] == "no quantized form of GRU"
    assert "norm" not in skipped  # holds no matrix


def test_the_last_matching_rule_wins():
    rules = [
        {"target": "Linear", "scheme": "w4"},
        {"target": "blocks.1.*", "scheme": "w3"},
        {"target": "down", "scheme": {"num_bits": 8}},
        {"target": "blocks.0.up", "scheme": None},
    ]
    chosen, skipped = schemes(Model(), rules)
    assert chosen == {"blocks.0.down": "w8", "blocks.1.up": "w3", "blocks.1.down": "w8"}
    assert skipped["blocks.0.up"] == "float by rule"
    assert skipped["conv"] == "no rule matches"


@pytest.mark.parametrize("target", ["lm_head", "Model.lm_head", "embed", "Embedding"])
def test_head_and_embedding_are_quantized_if_a_rule_names_them(target):
    model = nn.ModuleDict({"Model": Model()})
    chosen, _ = schemes(model, [{"target": "*", "scheme": "w4"}, {"target": target, "scheme": "w8"}])
    name = "Model.lm_head" if "head" in target else "Model.embed"
    assert chosen[name] == "w8"
    assert chosen["Model.conv"] == "w4"


def test_ignore_takes_names_patterns_types_and_containers():
    for ignore in (["blocks"], ["blocks.*"], ["*.up", "down"], ["ModuleDict"]):
        chosen, skipped = schemes(Model(), "w4", ignore=ignore)
        assert set(chosen) == {"conv"}
        assert skipped["blocks.0.up"] == "ignored"


def test_target_module_narrows():
    chosen, skipped = schemes(Model(), "w4", target_module="blocks.1")
    assert set(chosen) == {"blocks.1.up", "blocks.1.down"}
    assert skipped["conv"] == "outside target_module"
    with pytest.raises(ValueError, match="target_module='block' does not exist; the children are"):
        schemes(Model(), "w4", target_module="block")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"spec": [{"target": "blocs.*", "scheme": "w4"}]}, r"rule target 'blocs.\*' matches no module. Did you mean"),
        ({"spec": [{"target": "Linaer", "scheme": "w4"}]}, "Did you mean one of .*Linear"),
        ({"spec": "w4", "ignore": ["lm_haed"]}, "ignore pattern 'lm_haed' matches no module.*lm_head"),
        ({"spec": "w4", "ignore": ["Linear", "Conv1d"]}, "no layer to quantize. Left in float: .*ignored"),
        ({"spec": "w4g48"}, r"does not divide in_features of 4 layers.*blocks.0.up \(in_features=32.*: \[32, 16, 8\]"),
        ({"spec": []}, "list of rules is empty"),
        ({"spec": "w16"}, "8 bits or less"),
        ({"spec": {"num_bits": 8, "granularity": "token"}}, "granularity"),
    ],
)
def test_bad_requests_are_refused_with_the_remedy(kwargs, message):
    with pytest.raises(ValueError, match=message):
        schemes(Model(), **kwargs)


def test_rules_of_the_wrong_form_are_refused():
    with pytest.raises(TypeError, match="keys 'target' and 'scheme'"):
        parse_rules([{"layer": "Linear", "scheme": "w4"}])


def test_a_model_without_layers_says_so():
    with pytest.raises(ValueError, match="no Linear or convolution layer"):
        prepare(nn.Sequential(nn.ReLU()), "w4")


def test_a_single_layer_is_a_model():
    model = nn.Linear(8, 4)
    prepare(model, "w4")
    assert type(model) is QATLinear


def test_padding_allows_what_does_not_divide():
    chosen, _ = schemes(Model(), "w4g48-pad")
    assert len(chosen) == 5


def test_not_finite_weights_are_refused_and_named():
    model = Model()
    with torch.no_grad():
        model.blocks[0]["up"].weight[3, 4] = float("nan")
        model.conv.weight[0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"NaN or infinite weights in blocks.0.up, conv"):
        prepare(model, "w4")
    assert not quantized_layers(model)  # nothing half done


# ---------------------------------------------------------------------------------------------- what trains


def test_children_that_do_not_train_are_skipped_unless_named():
    model = nn.ModuleDict({"teacher": nn.Sequential(nn.Linear(8, 8)), "student": nn.Sequential(nn.Linear(8, 8))})
    model["teacher"].requires_grad_(False)
    chosen, skipped = schemes(model, "w4")
    assert set(chosen) == {"student.0"}
    assert skipped["teacher.0"].startswith("its part of the model does not train (a rule with target 'teacher'")
    rules = [{"target": "*", "scheme": "w4"}, {"target": "teacher.*", "scheme": "w8"}]
    assert schemes(model, rules)[0] == {"teacher.0": "w8", "student.0": "w4"}


def test_a_child_that_trains_in_part_is_quantized_whole():
    model = nn.ModuleDict({"net": nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), "head": nn.Linear(8, 8)})
    model["net"][0].requires_grad_(False)
    assert set(schemes(model, "w4")[0]) == {"net.0", "net.1", "head"}


def test_frozen_parts_are_found_inside_wrappers():
    model = nn.ModuleDict({"backbone": nn.Sequential(nn.Linear(8, 8)), "head": nn.Linear(8, 8)})
    model["backbone"].requires_grad_(False)
    wrapped = nn.ModuleDict({"task": nn.ModuleDict({"model": model}), "loss": nn.MSELoss()})
    assert set(schemes(wrapped, "w4")[0]) == {"task.model.head"}
    assert schemes(wrapped, [{"target": "*", "scheme": "w4"}, {"target": "backbone", "scheme": "w8"}])[0] == {
        "task.model.backbone.0": "w8",
        "task.model.head": "w4",
    }


# ---------------------------------------------------------------------------------------------- what rules reach


def test_rules_reach_what_their_target_contains():
    model = nn.ModuleDict({"encoder": nn.Sequential(nn.Linear(8, 8), nn.ReLU()), "decoder": nn.Linear(8, 8)})
    rules = [{"target": "Linear", "scheme": "w4"}, {"target": "encoder", "scheme": "w8"}]
    assert schemes(model, rules)[0] == {"encoder.0": "w8", "decoder": "w4"}
    rules = [{"target": nn.Sequential, "scheme": None}, {"target": "decoder", "scheme": "w2"}]
    chosen, skipped = schemes(model, rules)
    assert chosen == {"decoder": "w2"}
    assert skipped == {"encoder.0": "float by rule"}
    assert schemes(model, {"target": nn.Linear, "scheme": "w4"})[0] == {"encoder.0": "w4", "decoder": "w4"}


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("LayerNorm", r"'LayerNorm' matches no layer that can be quantized \(it holds no matrix\)"),
        ("attention", r"'attention' matches no layer .*attention.out_proj: nn.MultiheadAttention uses its weight"),
        ("outer.*", r"'outer.\*' matches no layer that can be quantized \(outer.embed: embeddings stay in float"),
    ],
)
def test_a_rule_that_reaches_no_quantizable_layer_is_refused(target, message):
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(8, 8),
            "norm": nn.LayerNorm(8),
            "attention": nn.MultiheadAttention(8, 2),
            "outer": nn.ModuleDict({"embed": nn.Embedding(4, 8)}),
        }
    )
    with pytest.raises(ValueError, match=message):
        prepare(model, [{"target": "*", "scheme": "w4"}, {"target": target, "scheme": "w8"}])


def test_rules_without_effect_are_told():
    rules = [{"target": "Linear", "scheme": "w8"}, {"target": "*", "scheme": "w4"}]
    assert prepare(nn.Sequential(nn.Linear(8, 8)), rules).idle_targets == ("Linear",)


@pytest.mark.parametrize("ignore", [nn.Conv1d, [nn.Conv1d], "Conv1d", ["conv"]])
def test_what_is_ignored_may_be_a_class(ignore):
    model = nn.ModuleDict({"linear": nn.Linear(8, 8), "conv": nn.Conv1d(8, 8, 3)})
    assert [layer.name for layer in prepare(model, "w4", ignore=ignore).layers] == ["linear"]


def test_networks_inside_metrics_are_skipped():
    class NetworkMetric(Metric):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(8, 8)

        def update(self):
            pass

        def compute(self):
            pass

    model = nn.ModuleDict({"net": nn.Linear(8, 8), "metric": NetworkMetric()})
    chosen, skipped = schemes(model, "w4")
    assert set(chosen) == {"net"}
    assert skipped["metric.net"] == "part of a torchmetrics Metric"


# ------------------------------------------------------------------------------------ subclasses and mapping


class MyLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class QATMyLinear(QATLinear, MyLinear):
    float_class = MyLinear

    def forward(self, x):
        return 2 * QATLinear.forward(self, x)


def test_subclasses_need_an_explicit_mapping():
    model, x = nn.Sequential(MyLinear(8, 8), nn.Linear(8, 8)), torch.randn(2, 8)
    _, skipped = schemes(model, "w8")
    assert skipped["0"] == "no quantized form of MyLinear, a subclass of Linear (support it with mapping=)"
    expected = model(x)
    prepare(model, "w8", mapping={MyLinear: QATMyLinear})
    assert type(model[0]) is QATMyLinear
    assert torch.allclose(model(x), expected, atol=0.05)


def test_weight_that_is_computed_is_left_alone():
    model = nn.Sequential(nn.utils.spectral_norm(nn.Linear(8, 8)), nn.Linear(8, 8))
    chosen, skipped = schemes(model, "w4")
    assert set(chosen) == {"1"}
    assert skipped["0"] == "its weight is computed, not a parameter"


def test_layers_without_a_shape_are_listed():
    model = nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 8))
    assert schemes(model, "w4")[1]["0"].startswith("its shape is not known yet")
    model(torch.randn(2, 5))
    assert set(schemes(model, "w4")[0]) == {"0", "1"}


def test_layers_without_a_shape_do_not_stop_the_count_of_bits():
    model = nn.Sequential(nn.Linear(32, 8, bias=False), nn.LazyLinear(8))
    prepare(model, "w4")
    assert bit_report(model) == BitReport(quantized=5.0, model=5.0)


def test_what_was_quantized_while_it_trained_stays_so_when_it_is_frozen():
    model = nn.ModuleDict({"body": nn.Linear(8, 8), "top": nn.Linear(8, 8)})
    prepare(model, "w4")
    model["body"].requires_grad_(False)
    prepare(model, "w4")
    assert set(quantized_layers(model)) == {"body", "top"}


# ------------------------------------------------------------------------------------------------------ ties


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 16)
        self.body = nn.Linear(16, 16)
        self.head = nn.Linear(16, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.body(self.embed(tokens)))


def test_a_head_tied_to_an_embedding_is_a_head_whatever_its_name():
    chosen, skipped = schemes(Tied(), "w4")
    assert set(chosen) == {"body"}
    assert "output head" in skipped["head"]


@pytest.mark.parametrize("target", ["head", "embed", "Embedding"])
def test_tied_layers_share_one_quantizer_and_stay_tied(target):
    model = Tied()
    prepare(model, [{"target": "body", "scheme": "w4"}, {"target": target, "scheme": "w8a8"}], learn_scales=True)
    assert model.head.weight is model.embed.weight
    assert model.head.weight_fake_quant is model.embed.weight_fake_quant
    tokens = torch.randint(0, 12, (2, 5))
    assert torch.equal(model.embed(tokens), model.head.fake_quantized_weight()[tokens])
    names = [name for name, _ in model.named_parameters() if "log_scale_ratio" in name]
    assert len(names) == 2  # one for the body, one for the tie
    model(tokens).sum().backward()
    assert model.embed.weight.grad is not None


def test_ties_that_would_come_apart_are_refused():
    with pytest.raises(ValueError, match=r"'head' shares its weight with 'embed'.*add both to ignore"):
        schemes(Tied(), [{"target": "head", "scheme": "w4"}], ignore=["embed"])
    both = [{"target": "head", "scheme": "w4"}, {"target": "embed", "scheme": "w8"}]
    with pytest.raises(ValueError, match="share one weight; give them one scheme"):
        schemes(Tied(), both)


def test_a_tie_with_something_that_cannot_be_quantized_is_refused():
    model = Tied()
    model.other = nn.Bilinear(1, 1, 1)
    model.other.weight = model.body.weight
    with pytest.raises(ValueError, match="'body' shares its weight with 'other'"):
        schemes(model, "w4")


def test_shared_modules_are_quantized_once():
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": shared})
    chosen, _ = schemes(model, "w4")
    assert set(chosen) == {"a"}
    assert schemes(model, [{"target": "b", "scheme": "w4"}])[0] == {"a": "w4"}


# ----------------------------------------------------------------------------------------------- idempotence


def test_preparing_twice_changes_nothing_and_another_scheme_replaces():
    model = Model()
    prepare(model, "w4", learn_scales=True)
    before = {name: layer.weight_fake_quant for name, layer in quantized_layers(model).items()}
    prepare(model, "w4", learn_scales=True)
    assert {name: layer.weight_fake_quant for name, layer in quantized_layers(model).items()} == before
    prepare(model, "w3", ignore=["blocks"])
    after = quantized_layers(model)
    assert set(after) == {"conv"}
    assert after["conv"].weight_fake_quant.scheme == QuantScheme.parse("w3")
    assert type(model.blocks[0]["up"]) is nn.Linear


# ----------------------------------------------------------------------------------------------- real models


def test_hugging_face_models_from_config():
    transformers = pytest.importorskip("transformers")
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64))
    chosen, skipped = schemes(gpt2, "w4")
    assert len(chosen) == 4
    assert {type(gpt2.get_submodule(name)).__name__ for name in chosen} == {"Conv1D"}
    assert "output head" in skipped["lm_head"]
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=64
        )
    )
    chosen, skipped = schemes(llama, "w4g16")
    assert len(chosen) == 14
    assert "output head" in skipped["lm_head"]
    bert = transformers.BertModel(
        transformers.BertConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
        )
    )
    assert len(schemes(bert, "w8a8", ignore=["pooler"])[0]) == 6


# ---------------------------------------------------------------------------------------------- ties that stay in float


class TiedModel(nn.Module):
    def __init__(self, **embedding):
        super().__init__()
        self.embed = nn.Embedding(10, 8, **embedding)
        self.lm_head = nn.Linear(8, 10, bias=False)
        self.lm_head.weight = self.embed.weight


@pytest.mark.parametrize(
    ("model", "rules", "options", "message"),
    [
        (TiedModel(), [{"target": "embed", "scheme": None}], {}, "'embed' .Embedding., which stays in float .float by"),
        (TiedModel(max_norm=1.0), [], {}, "stays in float .an embedding with max_norm"),
        (TiedModel(), [], {"target_module": "lm_head"}, "stays in float .outside target_module"),
        (TiedModel(), [], {"ignore": "embed"}, "stays in float .ignored"),
    ],
)
def test_a_tie_does_not_undo_the_choice_of_float(model, rules, options, message):
    with pytest.raises(ValueError, match=message):
        prepare(model, [{"target": "lm_head", "scheme": "w8"}, *rules], **options)


def test_a_tie_brings_its_partner():
    plan = prepare(TiedModel(), [{"target": "lm_head", "scheme": "w8"}])
    assert [layer.name for layer in plan.layers] == ["embed", "lm_head"]


def test_the_whole_name_of_a_module_means_that_module_alone():
    def block():
        return nn.ModuleDict({"conv1": nn.Conv2d(4, 4, 3), "conv2": nn.Conv2d(4, 4, 3)})

    model = nn.ModuleDict({"conv1": nn.Conv2d(3, 4, 3), "layer1": block(), "fc": nn.Linear(4, 4)})
    rules = parse_rules("w4")
    names = lambda plan: [layer.name for layer in plan.layers]  # noqa: E731
    assert names(make_plan(model, rules, ["conv1", "fc"])) == ["layer1.conv1", "layer1.conv2"]
    assert names(make_plan(model, rules, ["*.conv1"])) == ["conv1", "layer1.conv2", "fc"]
    assert names(make_plan(model["layer1"], rules, ["conv1"])) == ["conv2"]
    assert names(make_plan(nn.ModuleDict({"model": model}), rules, ["model.conv1"]))[0] == "model.layer1.conv1"
    ruled = make_plan(model, parse_rules([{"target": "*", "scheme": "w4"}, {"target": "conv1", "scheme": "w8"}]))
    assert [layer.scheme.num_bits for layer in ruled.layers] == [8, 4, 4, 4]


def test_parameters_outside_layers_do_not_read_as_if_the_whole_model_stayed_in_float():
    class WithPositions(nn.Module):
        def __init__(self):
            super().__init__()
            self.pos, self.fc = nn.Parameter(torch.zeros(4, 8)), nn.Linear(8, 8)

    model = nn.Sequential(WithPositions(), nn.Linear(8, 2))
    plan = make_plan(model, parse_rules("w4"))
    assert plan.skipped == {"0": "no quantized form of the parameters outside layers of WithPositions"}
    assert [layer.name for layer in plan.layers] == ["0.fc", "1"]
