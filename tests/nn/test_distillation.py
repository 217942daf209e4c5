"""Losses in closed form, calls that are compared, and teachers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_qat.nn import prepare, quantized_layers
from lightning_qat.nn.calls import around_calls, attention_mask
from lightning_qat.nn.distillation import DistillationError, Objective, kl_divergence, relative_error
from lightning_qat.nn.distiller import Distiller, default_student
from lightning_qat.nn.float_model import (
    copy_weights,
    digest,
    float_copy,
    keeps_float_weights,
    quantizers_passing,
    weights_of,
)
from lightning_qat.nn.forward import evaluating
from lightning_qat.nn.teacher import CopyTeacher, FunctionTeacher, ModuleTeacher, OwnWeights


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ------------------------------------------------------------------------------------------------------ the losses


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kl_and_its_gradient_in_closed_form(temperature):
    student, teacher = random(3, 5, 7).requires_grad_(), random(3, 5, 7, seed=1)
    loss = kl_divergence(student, teacher, temperature)
    loss.backward()
    total = 0.0
    for s, t in zip(student.detach().view(-1, 7), teacher.view(-1, 7), strict=True):
        p, q = (torch.exp(z / temperature) / torch.exp(z / temperature).sum() for z in (t, s))
        total += temperature**2 * sum(p[i] * (p[i].log() - q[i].log()) for i in range(7))
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss.detach(), total / 15, rtol=1e-12, atol=0)
    # Hinton 2015, equation 2, with the factor T^2: T (softmax(s / T) - softmax(t / T)), averaged over positions.
    expected = temperature * (F.softmax(student / temperature, -1) - F.softmax(teacher / temperature, -1)) / 15
    torch.testing.assert_close(student.grad, expected.detach(), rtol=1e-12, atol=1e-15)
    assert torch.autograd.gradcheck(lambda s: kl_divergence(s, teacher, temperature), random(3, 5, 7).requires_grad_())


def test_kl_of_equal_logits_is_zero_whatever_is_added_to_them():
    teacher = random(4, 6)
    assert kl_divergence(teacher + 3.0, teacher).abs() < 1e-15
    assert kl_divergence(random(4, 6, seed=2), teacher) > 0


def test_a_class_without_probability_counts_nothing():
    teacher = torch.tensor([[0.0, 0.0, -torch.inf]], dtype=torch.float64)
    student = torch.tensor([[0.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    loss = kl_divergence(student, teacher)
    loss.backward()
    torch.testing.assert_close(loss.item(), torch.tensor(1.5).double().log().item(), rtol=1e-6, atol=0)
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("low", [-torch.inf, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_a_class_that_both_rule_out_counts_nothing(low, temperature):
    """As tokens that both are kept from: the rest is compared as if there were no such class."""
    kept, target = random(4, 5, dtype=torch.float32).requires_grad_(), random(4, 5, seed=1, dtype=torch.float32)
    ruled_out = torch.full((4, 2), low)
    student = torch.cat([kept.detach(), ruled_out], dim=-1).requires_grad_()
    loss = kl_divergence(student, torch.cat([target, ruled_out], dim=-1), temperature)
    expected = kl_divergence(kept, target, temperature)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(student.grad[:, :5], kept.grad)
    assert torch.equal(student.grad[:, 5:], torch.zeros(4, 2))


def test_a_class_that_the_student_alone_rules_out_is_infinitely_far():
    assert kl_divergence(torch.tensor([[0.0, -torch.inf]]), torch.tensor([[0.0, 0.0]])) == torch.inf


def test_kl_with_classes_elsewhere_is_that_with_classes_last():
    student, teacher = random(2, 5, 3, 4), random(2, 5, 3, 4, seed=1)
    expected = kl_divergence(student.permute(0, 2, 3, 1), teacher.permute(0, 2, 3, 1))
    assert kl_divergence(student, teacher, class_dim=1) == expected


@pytest.mark.parametrize("loss", [kl_divergence, relative_error])
def test_masked_positions_do_not_count_even_if_they_are_nan(loss):
    student, teacher = random(2, 4, 5), random(2, 4, 5, seed=1)
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 1]])
    kept = loss(student[mask.bool()].unsqueeze(0), teacher[mask.bool()].unsqueeze(0))
    student[0, 2:], teacher[0, 3], teacher[1, 1] = torch.nan, torch.nan, torch.inf
    student.requires_grad_()
    result = loss(student, teacher, mask=mask)
    result.backward()
    torch.testing.assert_close(result.detach(), kept, rtol=1e-12, atol=0)
    assert torch.equal(student.grad.abs().sum(-1) > 0, mask.bool())
    assert loss(student, teacher, mask=torch.zeros(2, 4)) == 0


def test_relative_error_in_closed_form():
    student, teacher = random(3, 4).requires_grad_(), random(3, 4, seed=1)
    loss = relative_error(student, teacher)
    loss.backward()
    torch.testing.assert_close(loss.detach(), ((student - teacher) ** 2).mean().detach() / (teacher**2).mean())
    torch.testing.assert_close(student.grad, (2 * (student - teacher) / (teacher**2).sum()).detach())
    assert relative_error(torch.zeros(3, 4), torch.ones(3, 4)) == 1
    assert relative_error(torch.zeros(3, 4), torch.zeros(3, 4)) == 0


def test_low_precision_outputs_are_compared_in_float32():
    student, teacher = random(8, 100, dtype=torch.bfloat16), random(8, 100, seed=1, dtype=torch.bfloat16)
    assert kl_divergence(student, teacher) == kl_divergence(student.float(), teacher.float())
    assert relative_error(student, teacher) == relative_error(student.float(), teacher.float())


@pytest.mark.parametrize(
    ("student", "teacher", "mask", "message"),
    [
        (random(2, 3), random(2, 4), None, r"student gives \(2, 3\), the teacher \(2, 4\).*vocabulary.*output="),
        (random(2, 1), random(2, 1), None, "one class says nothing. Use loss='mse'"),
        (random(2, 3, 4), random(2, 3, 4), torch.ones(2, 4), r"mask has the shape \(2, 4\).*\(2, 3\).*Give mask="),
    ],
)
def test_what_cannot_be_compared_is_refused(student, teacher, mask, message):
    with pytest.raises(DistillationError, match=message):
        kl_divergence(student, teacher, mask=mask)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"loss": "ce"}, ValueError, "loss='ce' must be 'kl' or 'mse'"),
        ({"temperature": 0}, ValueError, "temperature=0 must be positive"),
        ({"weight": -1.0}, ValueError, "weight=-1.0 must be positive"),
        ({"hidden_weight": "1"}, TypeError, "hidden_weight='1' must be a number"),
        ({"output": 1.5}, TypeError, "output=1.5 must be a name, a position, or a function"),
        ({"mask": "attention_mask"}, TypeError, "must be a function of the batch"),
        ({"class_dim": "1"}, TypeError, "class_dim='1' must be the number of a dimension"),
    ],
)
def test_bad_objectives_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        Objective(**arguments)


def test_the_part_of_an_output_that_is_compared():
    x, y = random(2, 3), random(2, 4)
    assert Objective().select(x, "student") is x
    assert Objective().select({"loss": y.mean(), "logits": x}, "student") is x
    assert Objective("mse").select({"last_hidden_state": x, "pooler_output": y}, "student") is x
    assert Objective(output=1).select((x, y), "student") is y
    assert Objective(output="scores").select({"scores": y}, "student") is y
    assert Objective(output=lambda output: output[0]).select((x, y), "student") is x
    for objective, output, message in (
        (Objective(), (x, y), r"output \(tuple\) has no logits that is a tensor.*output= .*module="),
        (Objective(), {"last_hidden_state": x}, r"output \(last_hidden_state\) has no logits"),
        (Objective(output=2), (x, y), "has no 2"),
        (Objective(output="scores"), {"logits": x}, "has no 'scores'"),
        (Objective(), x.long(), r"output \(Tensor\) has no logits that is a tensor of floating-point"),
    ):
        with pytest.raises(DistillationError, match=message):
            objective.select(output, "student")
    with pytest.raises(DistillationError, match="Give class_dim"):
        Objective().compare(random(1, 2, 3, 4), random(1, 2, 3, 4), None)


# ---------------------------------------------------------------------------------------------- calls and teachers


class Net(nn.Module):
    """With dropout, batch statistics, and a block that is called twice."""

    def __init__(self, dropout=0.5, norm=True):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.inner = nn.Linear(8, 8)
            self.block = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
            self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()
            self.dropout = nn.Dropout(dropout)
            self.out = nn.Linear(8, 4)

    def forward(self, x):
        x = self.dropout(self.norm(self.inner(x)))
        return self.out(self.block(self.block(x)))


def prepared(scheme="w2", **arguments):
    net = Net(**arguments)
    prepare(net, scheme, estimator="ste")
    return net


def distil(distiller, *batches):
    with distiller.watch(batches[0]) as calls:
        outputs = [distiller.student(batch) for batch in batches]
    return distiller.loss(calls), outputs


def test_a_call_is_compared_with_the_float_model_and_else_undisturbed():
    x = random(6, 8, dtype=torch.float32)
    reference, net = prepared(), prepared()
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    teacher = CopyTeacher(net)
    torch.manual_seed(5)
    expected = reference(x)
    torch.manual_seed(5)
    loss, (output,) = distil(Distiller(net, teacher, Objective(temperature=2.0)), x)
    assert torch.equal(output, expected)
    assert torch.equal(net.norm.running_mean, reference.norm.running_mean)
    assert not torch.equal(net.norm.running_mean, buffers["norm.running_mean"])
    assert torch.equal(teacher.module.norm.running_mean, buffers["norm.running_mean"])
    assert loss == kl_divergence(expected, Net().eval()(x), 2.0)
    assert "_compiled_call_impl" not in vars(net)


def test_calls_without_gradients_do_not_count_and_others_are_averaged():
    x, y = random(6, 8, dtype=torch.float32), random(6, 8, seed=1, dtype=torch.float32)
    net = prepared(dropout=0.0, norm=False)
    distiller = Distiller(net, CopyTeacher(net), Objective())
    both, (first, second) = distil(distiller, x, y)
    float_net = Net(0.0, norm=False)
    singles = [kl_divergence(output, float_net(batch)) for output, batch in ((first, x), (second, y))]
    assert both == torch.stack(singles).mean()
    with torch.no_grad(), distiller.watch() as calls:
        net(x)
    with pytest.raises(DistillationError, match=r"Net was not called, or no call had gradients.*module='...'"):
        distiller.loss(calls)


def test_the_wrapper_is_taken_out_even_if_the_call_fails():
    net = prepared()
    with pytest.raises(RuntimeError, match="shapes"), Distiller(net, CopyTeacher(net), Objective()).watch():
        net(torch.zeros(6, 9))
    assert "_compiled_call_impl" not in vars(net)
    assert all("forward" not in vars(module) for module in net.modules())


def test_frozen_weights_teach_the_same_as_a_copy_to_the_bit():
    x = random(6, 8, dtype=torch.float32)
    net = prepared("w2a8", norm=False)
    prepare(net, "w2a8", learn_scales=True)
    assert not keeps_float_weights(net)
    net.requires_grad_(False)
    for layer in quantized_layers(net).values():
        layer.weight_fake_quant.requires_grad_(True)
    assert keeps_float_weights(net)
    results = []
    for teacher in (OwnWeights(net), CopyTeacher(net)):
        torch.manual_seed(1)
        net.zero_grad()
        loss, _ = distil(Distiller(net, teacher, Objective(), hidden=["block"]), x)
        loss.backward()
        results.append([loss.detach(), *[p.grad.clone() for p in net.parameters() if p.grad is not None]])
    assert len(results[0]) == 1 + 3
    assert all(map(torch.equal, *results))
    assert net.training
    assert all("forward" not in vars(module) for module in net.modules())


def test_a_model_with_statistics_that_move_is_no_teacher_of_its_own():
    net = prepared(norm=True).requires_grad_(False)
    assert not keeps_float_weights(net)
    assert keeps_float_weights(prepared(norm=False).requires_grad_(False))
    with pytest.raises(DistillationError, match="teacher='copy'"):
        OwnWeights(net)


def test_a_model_that_counts_its_calls_is_no_teacher_of_its_own():
    net = prepared(norm=False).requires_grad_(False)
    net.register_buffer("cache", torch.zeros(3), persistent=False)
    assert keeps_float_weights(net)
    net.register_buffer("calls", torch.zeros((), dtype=torch.long))
    assert not keeps_float_weights(net)


def test_a_teacher_goes_to_the_device_of_the_student_if_it_is_on_one():
    table, spread = nn.Module(), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    table.register_buffer("logits", torch.zeros(3))
    for teacher, devices in ((table, {"meta"}), (nn.Linear(2, 2), {"meta"}), (spread, {"cpu", "meta"})):
        ModuleTeacher(teacher).suit(nn.Linear(2, 2), torch.device("meta"))
        assert {weight.device.type for weight in weights_of(teacher).values()} == devices


def test_own_weights_that_change_are_noticed_unless_they_come_back_as_they_were():
    x = random(6, 8, dtype=torch.float32)
    net = prepared(norm=False)
    prepare(net, "w2", learn_scales=True)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_("fake_quant" in name)
    distiller = Distiller(net, OwnWeights(net), Objective())
    with torch.no_grad():
        net.inner.weight.copy_(net.inner.weight.clone())
    distil(distiller, x)
    with torch.no_grad():
        net.inner.weight[0, 0] += 1
    with pytest.raises(DistillationError, match=r"train now or were changed.*teacher='copy'"):
        distil(distiller, x)
    with torch.no_grad():
        net.inner.weight[0, 0] -= 1
    net.out.bias.requires_grad_(True)
    with pytest.raises(DistillationError, match=r"train now or were changed"):
        distil(distiller, x)


def test_passing_quantizers_observe_nothing():
    net = prepared("w2a8")
    prepare(net, "w2a8", observer="mse")
    with quantizers_passing(net), evaluating(net), torch.no_grad():
        assert torch.equal(net(random(6, 8, dtype=torch.float32)), Net().eval()(random(6, 8, dtype=torch.float32)))
    assert all(layer.weight_fake_quant.is_stale for layer in quantized_layers(net).values())


def test_a_copy_is_a_float_model_that_shares_nothing():
    net = prepared()
    net.kept = net(random(6, 8, dtype=torch.float32)).sum()  # not a leaf: deepcopy alone would refuse it
    twin = float_copy(net)
    assert not quantized_layers(twin)
    assert not any(module.training for module in twin.modules())
    assert not any(parameter.requires_grad for parameter in twin.parameters())
    assert {w.data_ptr() for w in twin.parameters()}.isdisjoint({w.data_ptr() for w in net.parameters()})
    assert list(weights_of(twin)) == list(weights_of(net))
    assert digest(weights_of(twin)) == digest(weights_of(net))
    with torch.no_grad():
        twin.norm.running_var[0] += 1e-7
    assert digest(weights_of(twin)) != digest(weights_of(net))
    copy_weights(weights_of(net), twin)
    assert digest(weights_of(twin)) == digest(weights_of(net))
    with pytest.raises(DistillationError, match="of another model"):
        copy_weights({}, twin)


def test_what_cannot_be_copied_is_told():
    net = prepared()
    net.lock = __import__("threading").Lock()
    with pytest.raises(DistillationError, match=r"copy of Net, which cannot be copied.*teacher=\.\.\."):
        float_copy(net)
    with pytest.raises(DistillationError, match="meta device"):
        float_copy(nn.Linear(2, 2, device="meta"))


def test_any_module_teaches_and_one_of_another_dtype_gets_inputs_of_that():
    x = random(6, 8, dtype=torch.float32)
    net, other = prepared(norm=False, dropout=0.0), Net(0.9, norm=False)
    other.inner.bias.data += 1
    teacher = ModuleTeacher(other)
    loss, (output,) = distil(Distiller(net, teacher, Objective()), x)
    assert loss == kl_divergence(output, copy.deepcopy(other).eval()(x))
    assert other.training
    teacher = ModuleTeacher(other, torch.bfloat16)
    teacher.suit(net, torch.device("cpu"))
    loss, (output,) = distil(Distiller(net, teacher, Objective()), x)
    assert loss == kl_divergence(output, copy.deepcopy(other).eval()(x.bfloat16()))


def test_a_function_of_the_batch_teaches_one_call():
    x, logits = random(6, 8, dtype=torch.float32), random(6, 4, dtype=torch.float32)
    net = prepared()
    distiller = Distiller(net, FunctionTeacher(lambda batch: logits), Objective())
    loss, (output,) = distil(distiller, x)
    assert loss == kl_divergence(output, logits)
    with pytest.raises(DistillationError, match=r"called several times.*Give a module"):
        distil(distiller, x, x)
    with pytest.raises(DistillationError, match="no layers: leave hidden out"):
        Distiller(net, FunctionTeacher(lambda batch: logits), Objective(), hidden=["block"])


def test_layer_outputs_are_compared_in_each_of_their_calls():
    x = random(6, 8, dtype=torch.float32)
    net = prepared(dropout=0.0, norm=False)
    distiller = Distiller(net, CopyTeacher(net), Objective(weight=0.0, hidden_weight=3.0), hidden=["block", "out"])
    assert distiller.hidden == ["block", "out"]
    loss, _ = distil(distiller, x)
    ours, theirs = (
        [(first := each.block(each.inner(x))), (second := each.block(first)), each.out(second)]
        for each in (net, Net(0.0, norm=False))
    )
    torch.testing.assert_close(loss, 3 * torch.stack(list(map(relative_error, ours, theirs))).mean())
    loss.backward()
    assert net.inner.weight.grad.abs().max() > 0
    with pytest.raises(DistillationError, match="weight=0 and no hidden layers nothing is distilled"):
        Distiller(net, distiller.teacher, Objective(weight=0.0))


def test_patterns_of_hidden_name_the_outermost_modules():
    net = prepared()

    def find(*patterns, prefix=""):
        return Distiller(net, CopyTeacher(net), Objective(), hidden=patterns, prefix=prefix).hidden

    assert find("*") == ["inner", "block", "norm", "dropout", "out"]
    assert find("Linear") == ["inner", "block.0", "out"]
    assert find("Linear", "block") == ["inner", "block.0", "out", "block"]
    assert find("net.block", prefix="net") == ["block"]
    with pytest.raises(DistillationError, match=r"pattern of hidden 'blocs' matches no module. Did you mean.*'block'"):
        find("blocs")
    with pytest.raises(DistillationError, match=r"teacher Linear has no 'block'.*leave hidden out"):
        Distiller(net, ModuleTeacher(nn.Linear(8, 4)), Objective(), hidden=["block"])


class Checkpointed(nn.Module):
    def __init__(self, reentrant, saves=True):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.block, self.last = nn.Linear(8, 8), Net(0.0, norm=False), nn.Linear(4, 4)
        self.reentrant, self.saves = reentrant, saves

    def forward(self, x):
        x = self.first(x)
        saves = self.saves and self.training
        return self.last(checkpoint(self.block, x, use_reentrant=self.reentrant) if saves else self.block(x))


def test_what_is_recomputed_in_the_backward_pass_is_not_compared_again():
    gradients = []
    for saves in (True, False):
        net = Checkpointed(reentrant=False, saves=saves)
        prepare(net, "w4")
        distiller = Distiller(net, CopyTeacher(net), Objective(), hidden=["block.inner", "block"])
        loss, _ = distil(distiller, random(6, 8, dtype=torch.float32))
        loss.backward()
        gradients.append([loss.detach(), *[parameter.grad for parameter in net.parameters()]])
        assert not any(module._forward_hooks for module in net.modules())
    assert all(map(torch.equal, *gradients))


def test_layers_within_reentrant_checkpointing_have_no_gradient_and_are_refused():
    net = Checkpointed(reentrant=True)
    prepare(net, "w4")
    teacher, x = CopyTeacher(net), random(6, 8, dtype=torch.float32)
    distil(Distiller(net, teacher, Objective(), hidden=["block"]), x)  # what a checkpoint returns has one
    with pytest.raises(DistillationError, match=r"'block.inner' gives has no gradient.*use_reentrant=False"):
        distil(Distiller(net, teacher, Objective(), hidden=["block.inner"]), x)


def test_layers_that_the_student_skips_are_refused():
    class Skipping(Net):
        def forward(self, x):
            x = self.inner(x)
            return self.out(x if self.training else self.block(x))

    net = Skipping()
    prepare(net, "w4")
    with pytest.raises(DistillationError, match="'block' was called 0 times by the student and 1 times by the teacher"):
        distil(Distiller(net, CopyTeacher(net), Objective(), hidden=["block"]), random(6, 8, dtype=torch.float32))


def test_a_model_that_changes_its_input_is_refused():
    class InPlace(nn.Linear):
        def forward(self, x):
            return super().forward(x.mul_(2))

    net = nn.Sequential(InPlace(8, 4), nn.Linear(4, 4))
    prepare(net, "w4")
    with pytest.raises(DistillationError, match="changes its input in place"):
        distil(Distiller(net, CopyTeacher(net), Objective()), random(6, 8, dtype=torch.float32))


def test_a_model_may_take_entries_out_of_its_batch():
    class Popping(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 4)

        def forward(self, batch):
            return self.linear(batch.pop("x"))

    net = Popping()
    prepare(net, "w4")
    loss, _ = distil(Distiller(net, CopyTeacher(net), Objective()), {"x": random(6, 8, dtype=torch.float32)})
    assert loss > 0


# ------------------------------------------------------------------------------------------------- masks, compiling


def test_where_the_attention_mask_comes_from():
    class Model(nn.Module):
        def forward(self, input_ids, attention_mask=None):
            return input_ids

    mask, batch = torch.ones(2, 3), {"attention_mask": torch.zeros(2, 3)}
    model = Model()
    assert attention_mask(model, (1,), {"attention_mask": mask}, batch).all()
    assert attention_mask(model, (1, mask), {}, batch).all()
    assert attention_mask(model, ({"attention_mask": mask},), {}, batch).all()
    assert not attention_mask(model, (1,), {}, batch).any()
    assert attention_mask(model, (1,), {}, None) is None
    assert attention_mask(model, (1, torch.ones(2, 1, 3, 3)), {}, None) is None
    model.config = type("Config", (), {"is_encoder_decoder": True})
    assert attention_mask(model, (1, mask), {}, batch) is None


@pytest.mark.parametrize(
    ("make", "places"),
    [
        (lambda: random(2, 3, 4), lambda output, mask: output[mask]),
        (lambda: random(6, 4), lambda output, mask: output[mask.flatten()]),
        (lambda: random(2, 4), lambda output, mask: output),
    ],
    ids=["tokens", "flattened tokens", "pooled"],
)
def test_a_mask_of_tokens_applies_to_outputs_of_tokens(make, places):
    class Given(nn.Module):
        def __init__(self):
            super().__init__()
            self.offset = nn.Parameter(torch.zeros((), dtype=torch.float64))

        def forward(self, logits, attention_mask):
            return logits + self.offset

    net, target = Given(), random(6, 4, seed=3)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    output = make()
    wanted = target[: output.shape[0]] if output.dim() == 2 else target.view(2, 3, 4)
    distiller = Distiller(net, FunctionTeacher(lambda batch: wanted), Objective())
    with distiller.watch() as calls:
        net(output, mask)
    expected = kl_divergence(places(output, mask.bool()), places(wanted, mask.bool()))
    torch.testing.assert_close(distiller.loss(calls), expected, rtol=1e-12, atol=0)


def test_a_mask_that_does_not_fit_is_refused_and_a_given_one_is_used():
    net = prepared(norm=False, dropout=0.0)
    x = random(2, 5, 8, dtype=torch.float32)
    batch = {"attention_mask": torch.tensor([[1, 1, 1, 0, 1, 1], [1, 1, 1, 1, 1, 0]])}
    teacher = CopyTeacher(net)
    with (
        pytest.raises(DistillationError, match=r"mask has the shape \(2, 6\).*\(2, 5\).*Give mask="),
        Distiller(net, teacher, Objective()).watch(batch),
    ):
        net(x)
    objective = Objective(mask=lambda batch: batch["attention_mask"][:, 1:])
    distiller = Distiller(net, teacher, objective)
    with distiller.watch(batch) as calls:
        output = net(x)
    expected = kl_divergence(output, Net(0.0, norm=False)(x), mask=batch["attention_mask"][:, 1:])
    assert distiller.loss(calls) == expected
    with Distiller(net, teacher, Objective(mask=lambda batch: None)).watch(batch) as calls:
        net(x)
    assert distiller.loss(calls) == kl_divergence(output, Net(0.0, norm=False)(x))


@pytest.mark.parametrize("wrap", [True, False], ids=["torch.compile", "Module.compile"])
def test_a_compiled_student_is_compiled_once(wrap):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    net, plain = prepared(norm=False, dropout=0.0), prepared(norm=False, dropout=0.0)
    if wrap:
        student = torch.compile(net, backend=backend)
    else:
        net.compile(backend=backend)
        student = net
    teacher = CopyTeacher(student)
    distiller = Distiller(student, teacher, Objective())
    for seed in range(3):
        x = random(6, 8, seed=seed, dtype=torch.float32)
        loss, _ = distil(distiller, x)
        expected, _ = distil(Distiller(plain, teacher, Objective()), x)
        torch.testing.assert_close(loss, expected)
    loss.backward()
    assert net.inner.weight.grad.abs().max() > 0
    assert len(graphs) == 1
    assert not keeps_float_weights(student.requires_grad_(False))
    with pytest.raises(DistillationError, match="is compiled, and what its layers give cannot be read"):
        Distiller(student, teacher, Objective(), hidden=["inner"])
    torch._dynamo.reset()


def test_nested_wrappers_of_calls():
    net, order = nn.Linear(2, 2), []

    def wrapper(name):
        return lambda call, args, kwargs: (order.append(name), call(*args, **kwargs))[1]

    with around_calls(net, wrapper("outer")):
        with around_calls(net, wrapper("inner")):
            net(torch.zeros(1, 2))
        net(torch.zeros(1, 2))
    net(torch.zeros(1, 2))
    assert order == ["inner", "outer", "outer"]


def test_which_child_is_the_student():
    class Root(nn.Module):
        def __init__(self, **children):
            super().__init__()
            for name, child in children.items():
                setattr(self, name, child)

    frozen = nn.Linear(2, 2).requires_grad_(False)
    net = Net()
    assert default_student(Root(net=net, loss=nn.CrossEntropyLoss())) == ("net", net)
    assert default_student(Root(net=net, features=frozen)) == ("net", net)
    assert default_student(Root(parts=nn.ModuleDict({"net": net}))) == ("parts.net", net)
    for root in (
        Root(a=net, b=Net()),
        Root(parts=nn.ModuleList([net, Net()])),
        Root(scale=nn.Parameter(torch.ones(2))),
    ):
        assert default_student(root) == ("", root)
    quantized = prepared().requires_grad_(False)
    both = Root(backbone=quantized, head=nn.Linear(4, 4))
    assert default_student(both) == ("", both)
