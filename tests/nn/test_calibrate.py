"""Calibration: statistics against sums written out by hand, and the sharing of inputs."""

import pytest
import torch
from torch import nn

from lightning_qat.nn.calibrate import Calibrator, make_runner
from lightning_qat.nn.forward import call_forward
from lightning_qat.nn.input_matrix import columns_per_channel, token_matrix

CONVS = {
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1), (5, 4, 16)),
    "conv1d unbatched": (nn.Conv1d(4, 6, 3), (4, 16)),
    "conv1d same": (nn.Conv1d(4, 6, 4, padding="same"), (5, 4, 16)),
    "conv2d grouped": (nn.Conv2d(8, 12, (3, 2), padding=(1, 0), groups=2), (2, 8, 7, 9)),
    "conv2d depthwise": (nn.Conv2d(8, 16, 3, groups=8, bias=False), (2, 8, 7, 9)),
    "conv2d circular": (nn.Conv2d(4, 6, 3, padding=2, padding_mode="circular", dilation=2), (2, 4, 7, 9)),
    "conv2d reflect": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", stride=(2, 1)), (2, 4, 7, 9)),
    "conv3d": (nn.Conv3d(4, 6, 2, dilation=(1, 2, 1), groups=2), (2, 4, 5, 6, 7)),
}


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")
@pytest.mark.parametrize("name", CONVS)
def test_a_convolution_is_a_product_with_its_token_matrix(name):
    conv, shape = CONVS[name]
    x = torch.randn(shape)
    tokens = token_matrix(conv, x)
    weight = conv.weight.flatten(1).reshape(conv.groups, -1, tokens.shape[-1])
    product = (tokens @ weight.mT).permute(0, 2, 1).flatten(0, 1)  # [O, N]
    expected = conv(x) - (0 if conv.bias is None else conv.bias.view(-1, *[1] * len(conv.kernel_size)))
    expected = expected if len(shape) == len(conv.kernel_size) + 2 else expected[None]
    assert torch.allclose(product, expected.transpose(0, 1).flatten(1), atol=1e-5)
    assert columns_per_channel(conv) == conv.weight[0, 0].numel()


def collect(model, batches, layers=None, step=None, **kwargs):
    layers = layers or {n: m for n, m in model.named_modules() if hasattr(m, "weight") and m.weight.dim() > 1}
    calibrator = Calibrator(layers, batches, make_runner(model, batches, step), **kwargs)
    plan, stats = calibrator.plan(), {}
    for _, part in calibrator.collect(plan):
        stats |= part
    assert not any(module._forward_pre_hooks for module in model.modules())
    return plan, stats


def test_statistics_are_the_sums_over_all_batches():
    model = nn.Sequential(nn.Linear(8, 8, dtype=torch.bfloat16))
    batches = [torch.randn(size, 3, 8, dtype=torch.bfloat16) for size in (4, 4, 1)]
    _, stats = collect(model, batches)
    x = torch.cat(batches).reshape(-1, 8).float()
    assert stats["0"].num_tokens == 27
    assert stats["0"].hessian.dtype == torch.float32
    assert torch.allclose(stats["0"].hessian[0], x.T @ x, atol=1e-4)
    assert torch.allclose(stats["0"].abs_mean[0], x.abs().mean(0), atol=1e-5)
    error = torch.randn(5, 8)
    expected = (x @ error.T).square().sum(1).mean().item()
    assert stats["0"].output_error(error) == pytest.approx(expected, rel=1e-4)


def test_statistics_are_float32_under_autocast():
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(64, 8)

    def step(batch):
        with torch.autocast("cpu", torch.bfloat16):
            model(batch)

    _, stats = collect(model, [x], step=step)
    assert torch.equal(stats["0"].hessian[0], x.T @ x)


def test_statistics_are_in_full_precision_whatever_the_run_has_chosen(monkeypatch):
    seen = []
    add = torch.Tensor.baddbmm_
    products = torch.backends.mkldnn.matmul

    def look(*args):
        seen.append(products.fp32_precision)
        return add(*args)

    monkeypatch.setattr(torch.Tensor, "baddbmm_", look)
    torch.set_float32_matmul_precision("medium")
    try:
        collect(nn.Sequential(nn.Linear(8, 8)), [torch.randn(4, 8)] * 2)
        assert torch.get_float32_matmul_precision() == "medium"
        assert products.fp32_precision == "bf16"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == ["ieee"]


class Attention(nn.Module):
    """Query, key and value are fed one tensor; ``mix`` another, and ``alone`` none."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.mix, self.alone = (nn.Linear(8, 8) for _ in range(5))

    def forward(self, x=None, attention_mask=None, split=False):
        k = self.k(x.clone() if split else x)
        return self.mix(self.q(x) + k * self.v(input=x))


def linears(model, *without):
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in without}


def test_layers_fed_the_same_tensor_share_one_hessian():
    model = Attention()
    plan, stats = collect(model, [torch.randn(2, 3, 8)], linears(model, "alone"))
    assert plan.passes == ((("q", "k", "v"), ("mix",)),)
    assert stats["q"].hessian is stats["k"].hessian is stats["v"].hessian
    assert str(plan) == "one-shot: 4 layers with 2 distinct inputs in one pass over 1 batch, Hessians of 0.00 GiB"


def test_layers_that_share_in_the_first_batch_only_are_told_apart():
    model = Attention()
    batches = [{"x": torch.randn(2, 3, 8), "split": split} for split in (False, True)]
    _, together = collect(model, batches, linears(model, "alone"))
    assert together["q"].hessian is not together["k"].hessian
    assert torch.equal(together["q"].hessian, together["k"].hessian)
    _, alone = collect(model, batches, {"k": model.k})
    assert torch.equal(together["k"].hessian, alone["k"].hessian)


@pytest.mark.parametrize("kilobytes", [1, 0.33, 0.001])
def test_a_small_budget_takes_more_passes_and_gives_the_same(kilobytes):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(4, 8), nn.Linear(8, 8))
    batches = [torch.randn(5, 8) for _ in range(3)]
    _, expected = collect(model, batches)
    plan, stats = collect(model, batches, memory_budget=int(kilobytes * 1000))
    assert len(plan.passes) == {1: 1, 0.33: 3, 0.001: 4}[kilobytes]
    assert sorted(stats) == ["0", "1", "2", "3"]
    assert all(torch.equal(stats[name].hessian, expected[name].hessian) for name in stats)


def test_padding_is_left_out():
    model = Attention()
    x, mask = torch.randn(2, 5, 8), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    _, masked = collect(model, [{"x": x, "attention_mask": mask}], linears(model, "alone"))
    kept = x[mask.bool()]
    assert masked["q"].num_tokens == 8
    assert torch.allclose(masked["q"].hessian[0], kept.T @ kept, atol=1e-5)
    assert masked["mix"].num_tokens == 8


def test_a_module_used_twice_sees_both_inputs():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            return self.linear(self.linear(x))

    model, x = Twice(), torch.randn(5, 8)
    _, stats = collect(model, [x])
    both = torch.cat([x, model.linear(x)])
    assert stats["linear"].num_tokens == 10
    assert torch.allclose(stats["linear"].hessian[0], both.T @ both, atol=1e-5)


def test_layers_without_tokens_have_no_statistics():
    model = Attention()
    _, stats = collect(model, [torch.randn(2, 3, 8)], linears(model))
    assert "alone" not in stats


def test_layers_that_only_saw_empty_inputs_have_no_statistics():
    model = Attention()
    _, stats = collect(model, [torch.randn(0, 3, 8)], linears(model, "alone"))
    assert stats == {}


def test_a_tensor_that_was_changed_in_place_is_another_input():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            y = x.clone()
            y += 10 * self.a(y)
            return self.b(y)

    model, x = Residual(), torch.randn(16, 8)
    plan, stats = collect(model, [x])
    assert plan.passes == ((("a",), ("b",)),)
    y = x + 10 * model.a(x)
    assert torch.allclose(stats["b"].hessian[0], y.T @ y, rtol=1e-4)


def test_batches_are_not_changed_by_the_model():
    model, x = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 8)), torch.randn(16, 8)
    expected = x.clone()
    collect(model, [x])
    assert torch.equal(x, expected)


def test_separated_layers_stay_within_the_budget_and_others_stay_together():
    model = Attention()
    batches = [{"x": torch.randn(2, 3, 8), "split": split} for split in (False, True)]
    calibrator = Calibrator(linears(model, "alone"), batches, make_runner(model, batches), memory_budget=256)
    parts = [sorted(names) for names, _ in calibrator.collect(calibrator.plan())]
    assert sorted(parts) == [[], ["k"], ["mix"], ["q"], ["v"]]


@pytest.mark.parametrize(
    ("shape", "kept"), [((2, 5, 8), 8), ((10, 8), 8), ((5, 2, 8), 10), ((2, 5, 1, 8), 10)], ids=str
)
def test_a_mask_applies_to_inputs_of_its_layout(shape, kept):
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    assert token_matrix(nn.Linear(8, 8), torch.randn(shape), mask).shape == (1, kept, 8)


@pytest.mark.parametrize(
    ("forward", "batch", "expected"),
    [
        (lambda self, x: x, (1, 2), 1),
        (lambda self, x, y: (x, y), (1, 2), (1, 2)),
        (lambda self, x, y=5: (x, y), [1, 2], (1, 5)),
        (lambda self, *xs: xs, (1, 2), (1, 2)),
        (lambda self, x: x, 7, 7),
        (lambda self, x, mask=None: (x, mask), {"x": 1, "mask": 2, "labels": 3}, (1, 2)),
        (lambda self, **all_of_it: all_of_it, {"x": 1}, {"x": 1}),
        (lambda self, batch: batch, {"x": 1}, {"x": 1}),
    ],
)
def test_forward_gets_what_it_takes_from_a_batch(forward, batch, expected):
    assert call_forward(type("Model", (nn.Module,), {"forward": forward})(), batch) == expected


def test_inputs_that_are_not_finite_are_refused_and_named():
    model = Attention()
    with pytest.raises(ValueError, match=r"inputs of the layer 'q' \(and of 3 other layers\) were NaN"):
        collect(model, [torch.full((2, 3, 8), torch.nan)], linears(model))


def test_no_batches_are_refused():
    with pytest.raises(ValueError, match="no calibration batches"):
        Calibrator({}, [], lambda index: None)
