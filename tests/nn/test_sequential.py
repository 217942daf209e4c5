"""Sequential calibration, against whole forward passes written out by hand."""

import copy

import pytest
import torch
from torch import nn

from lightning_qat import quantize_model, restore_float
from lightning_qat.nn import quantized_layers
from lightning_qat.nn.calibrate import Calibrator, make_runner
from lightning_qat.nn.convert import load_quantized_weights
from lightning_qat.nn.fingerprint import fingerprint
from lightning_qat.nn.plan import Plan
from lightning_qat.nn.rules import parse_rules
from lightning_qat.nn.selection import make_plan
from lightning_qat.nn.units import find_units
from lightning_qat.observers import MinMaxObserver
from lightning_qat.ptq import GPTQ
from lightning_qat.ptq.engine import quantize_layer
from tests.test_quantize_model import MODELS, snapshot


class Block(nn.Module):
    """A residual block whose inner layers are fed its input and a gate."""

    def __init__(self):
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)) * torch.sigmoid(self.gate(x)))


class Blocks(nn.Module):
    """What the tests below derive from: a stem, blocks in a list, a head."""

    def __init__(self, num_blocks=4, block=Block):
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.blocks = nn.ModuleList(block() for _ in range(num_blocks))
        self.head = nn.Linear(8, 8)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Skips(Blocks):
    """Later blocks take the outputs of earlier ones, as in a U-Net."""

    def forward(self, x):
        outputs = [self.stem(x)]
        for block in self.blocks[:2]:
            outputs.append(block(outputs[-1]))
        x = outputs.pop()
        for block in self.blocks[2:]:
            x = block(x) + outputs.pop()
        return self.head(x)


class ChangedInPlace(Blocks):
    """The model's own code changes an output in place."""

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
            x += 1
        return self.head(x)


class Memory(nn.Module):
    """Remembers its output where later blocks find it."""

    def __init__(self):
        super().__init__()
        self.linear, self.shared = nn.Linear(8, 8), []

    def forward(self, x):
        y = self.linear(x)
        if self.shared:
            y = y + self.shared[-1]
        self.shared.append(y)
        return y


class SideDoor(Blocks):
    """Blocks hand something on beside their outputs."""

    def __init__(self):
        super().__init__(block=Memory)

    def forward(self, x):
        memory = [torch.zeros(1)]
        for block in self.blocks:
            block.shared = memory
        return super().forward(x)


class Derived(Blocks):
    """What the model's own code made of an early output is needed late."""

    def forward(self, x):
        x = self.stem(x)
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index == 0:
                skip = torch.tanh(x)
        return self.head(x + skip)


class Leaving(Block):
    """Leaves its output behind in an attribute."""

    def forward(self, x):
        self.left = super().forward(x)
        return self.left.clone()


class Stale(Blocks):
    """Takes what a block has left behind: if that was skipped, it is from a forward pass before."""

    def __init__(self):
        super().__init__(block=Leaving)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x + self.blocks[0].left)


class ZeroGate(Block):
    """Fed through a side door, with an output that does not show it yet."""

    def __init__(self):
        super().__init__()
        self.gate_of_output, self.owner = nn.Parameter(torch.zeros(())), []

    def forward(self, x):
        if self.owner[0].blocks[0] is self:
            self.owner[0].mask = torch.sigmoid(20 * x.mean(-1, keepdim=True))
        return x + self.gate_of_output * super().forward(x * self.owner[0].mask)


class Hidden(Blocks):
    """A block leaves a mask behind, which only the inputs of later layers show."""

    def __init__(self):
        super().__init__(block=ZeroGate)
        self.mask = None
        for block in self.blocks:
            block.owner.append(self)


class Cleaning(SideDoor):
    """Tidies up at the end of its forward pass, and not elsewhere."""

    def __init__(self):
        super().__init__()
        self.memory = [torch.zeros(1)]
        for block in self.blocks:
            block.shared = self.memory

    def forward(self, x):
        y = Blocks.forward(self, x)
        del self.memory[1:]
        return y


class Box:
    """Holds a tensor where PyTorch does not look for it."""

    def __init__(self, x):
        self.x = x


class Boxing(Block):
    """Returns an object."""

    def forward(self, x):
        return Box(super().forward(x.x if isinstance(x, Box) else x))


class Boxes(Blocks):
    """Hands objects around."""

    def __init__(self):
        super().__init__(block=Boxing)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.x)


class TwiceThrough(Blocks):
    """Runs its blocks twice, with the same weights."""

    def forward(self, x):
        x = self.stem(x)
        for block in [*self.blocks, *self.blocks]:
            x = block(x)
        return self.head(x)


class OneLayerOutside(Blocks):
    """A layer of the first block is used once more, outside of it."""

    def forward(self, x):
        return super().forward(x) + self.blocks[0].down(self.blocks[0].up(self.stem(x)))


class Reordered(Blocks):
    """Takes its blocks in the order that the batch asks for."""

    def forward(self, x):
        order = [0, 1, 2, 3] if x[0, 0] > 0 else [1, 0, 2, 3]
        x = self.stem(x)
        for index in order:
            x = self.blocks[index](x)
        return self.head(x)


class SharedWeights(Blocks):
    """Two blocks share a weight."""

    def __init__(self):
        super().__init__()
        self.blocks[2].up.weight = self.blocks[0].up.weight


UNITS = ["stem", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "head"]
REPLAYED = {"Blocks": Blocks, "Skips": Skips, "ChangedInPlace": ChangedInPlace, "Derived": Derived}
NOT_REPLAYED = {
    "SideDoor": (SideDoor, "is not reproduced to the bit"),
    "Stale": (Stale, "is not reproduced to the bit"),
    "Hidden": (Hidden, "is not reproduced to the bit"),
    "Cleaning": (Cleaning, "is not reproduced to the bit"),
    "Boxes": (Boxes, "returns other objects than tensors"),
    "TwiceThrough": (TwiceThrough, "some of its parts run several times"),
    "OneLayerOutside": (OneLayerOutside, "some of its parts run several times"),
    "Reordered": (Reordered, "in another order for other batches"),
    "SharedWeights": (SharedWeights, "its parts share weights"),
}


def make_batches(sizes=(16, 16, 5)):
    torch.manual_seed(1)
    batches = [torch.randn(size, 4) for size in sizes]
    for index, batch in enumerate(batches):
        batch[0, 0] = 1.0 - 2 * (index % 2)
    return batches


def codes_by_hand(model, batches, units, scheme):
    """Return the codes that GPTQ gives if every unit sees what the quantized units before it give.

    Each unit is calibrated by whole forward passes of a model in which the units before have quantized weights.
    """
    plan = make_plan(model, parse_rules(scheme))
    twin = copy.deepcopy(model)
    quantized = {}
    for unit in units:
        layers = [layer for layer in plan.layers if f"{layer.name}.".startswith(f"{unit}.")]
        if quantized:
            done = Plan(tuple(layer for layer in plan.layers if layer.name in quantized), {})
            load_quantized_weights(twin, done, quantized, layers[0].scheme.num_bits)
        modules = {layer.name: twin.get_submodule(layer.name) for layer in layers}
        calibrator = Calibrator(modules, batches, make_runner(twin, batches))
        stats = {}
        for _, some in calibrator.collect(calibrator.plan()):
            stats |= some
        new = {}
        for layer in layers:
            found, _ = quantize_layer(
                layer.name,
                layer.qat_class.to_matrix(layer.weight.detach()),
                [layer.scheme],
                [layer.scheme.num_bits],
                {"gptq": GPTQ()},
                MinMaxObserver(),
                stats[layer.name],
            )
            new[layer.name] = found["gptq"][0]
        quantized |= new
    return {name: weight.codes for name, weight in quantized.items()}


def assert_same_codes(results, expected, num_bits):
    found = results.weights["gptq", num_bits]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].codes, expected[name]) for name in expected)


@pytest.mark.parametrize("scheme", ["w3", "w2a8"])
@pytest.mark.parametrize("name", REPLAYED)
def test_block_replay_gives_what_whole_forward_passes_give(name, scheme):
    torch.manual_seed(0)
    model, batches = REPLAYED[name]().eval(), make_batches()
    results = quantize_model(model, batches, methods="gptq", scheme=scheme, sequential=True, progress=False)
    assert results.calibration.procedure == "by block replay"
    assert_same_codes(results, codes_by_hand(model, batches, UNITS, scheme), results.bits[0])
    one_shot = quantize_model(model, batches, methods="gptq", scheme=scheme, progress=False)
    found, other = results.weights["gptq", results.bits[0]], one_shot.weights["gptq", results.bits[0]]
    assert torch.equal(found["stem"].codes, other["stem"].codes)
    assert not torch.equal(found["head"].codes, other["head"].codes)


@pytest.mark.parametrize("name", sorted(set(NOT_REPLAYED) - {"SharedWeights", "Reordered"}))
def test_a_model_that_cannot_be_replayed_is_run_as_a_whole(name):
    torch.manual_seed(0)
    build, reason = NOT_REPLAYED[name]
    model, batches = build().eval(), make_batches((16, 16, 16))
    results = quantize_model(model, batches, methods="gptq", bits=3, sequential=True, progress=False)
    assert results.calibration.procedure.startswith("by whole forward passes, since ")
    assert reason in results.calibration.procedure
    assert_same_codes(results, codes_by_hand(model, batches, UNITS, "w3"), 3)


@pytest.mark.parametrize("name", ["SharedWeights", "Reordered"])
def test_what_has_no_order_is_quantized_too(name):
    build, reason = NOT_REPLAYED[name]
    model = build().eval()
    results = quantize_model(model, make_batches(), methods=("gptq", "awq"), bits=(4, 3), sequential=True)
    assert reason in results.calibration.procedure
    assert {name for name, _ in model.named_modules() if name in results.weights["awq", 3]} == {
        layer.name for layer in results.plan.layers
    }


@pytest.mark.parametrize(
    ("name", "units", "is_replayed"),
    [
        ("resnet", ["0", "1", "2", "4"], True),
        ("experts", [f"experts.{index}" for index in range(4)], True),
        ("gpt2", ["transformer.h.0", "transformer.h.1"], True),
        ("bert", ["bert.encoder.layer.0", "bert.encoder.layer.1", "bert.pooler", "classifier"], True),
        ("llama", ["model.layers.0", "model.layers.1"], True),
        ("reused", ["linear"], False),
    ],
)
def test_sequential_calibration_of_every_kind_of_model(name, units, is_replayed):
    torch.manual_seed(0)
    build, batches = MODELS[name]
    model, batches = build().eval(), batches()
    results = quantize_model(model, batches, methods="gptq", bits=2, sequential=True, progress=False)
    assert (results.calibration.procedure == "by block replay") == is_replayed
    planned = {layer.name for layer in results.plan.layers}
    units = [unit for unit in units if any(f"{layer}.".startswith(f"{unit}.") for layer in planned)]
    assert_same_codes(results, codes_by_hand(model, batches, units, "w2"), 2)


def test_an_encoder_and_a_decoder_are_replayed():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    batches = [{"input_ids": torch.randint(0, 32, (4, 12)), "decoder_input_ids": torch.randint(0, 32, (4, 7))}] * 2
    results = quantize_model(model, batches, methods="gptq", bits=3, sequential=True, progress=False)
    assert results.calibration.procedure == "by block replay"
    units = [f"{side}.block.{index}" for side in ("encoder", "decoder") for index in range(2)]
    assert_same_codes(results, codes_by_hand(model, batches, units, "w3"), 3)


def test_units_are_the_outermost_repeated_blocks_and_the_layers_outside():
    class Expert(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = nn.Linear(8, 2)
            self.experts = nn.ModuleList(Expert() for _ in range(2))

    model = nn.ModuleDict(
        {
            "stem": nn.Linear(8, 8),
            "encoder": nn.Sequential(
                nn.Sequential(Mixture(), nn.ReLU(), Mixture()), nn.Sequential(Mixture(), Mixture())
            ),
            "head": nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)),
        }
    )
    names = {module: name for name, module in model.named_modules()}
    layers = {module for module in names if isinstance(module, nn.Linear)}
    found = [names[unit] for unit in find_units(model, layers)]
    assert found == ["stem", "encoder.0.0", "encoder.0.2", "encoder.1.0", "encoder.1.1", "head.0", "head.2"]
    assert find_units(model["stem"], layers) == [model["stem"]]


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    torch.manual_seed(0)
    model, batches = Blocks().eval(), make_batches()
    before, classes = snapshot(model), [type(module) for module in model.modules()]
    if fails:
        batches[-1][:] = torch.nan
        with pytest.raises(ValueError, match="inputs of the layer 'stem' were NaN or infinite"):
            quantize_model(model, batches, methods="gptq", scheme="w2a8", sequential=True, progress=False)
    else:
        quantize_model(model, batches, scheme="w2a8", bits=(4, 2), sequential=True, progress=False)
    assert [type(module) for module in model.modules()] == classes
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())
    assert not quantized_layers(model)


def test_the_label_and_the_plan_are_told():
    model, batches = Blocks().eval(), make_batches()
    results = quantize_model(model, batches, methods=("rtn", "gptq"), bits=(4, 3), sequential=True, progress=False)
    assert str(results.calibration) == (
        "sequential (by block replay): 14 layers with 10 distinct inputs in 6 passes over 3 batches, "
        "Hessians of 0.00 GiB"
    )
    assert [results.calibration_of(method) for method in ("rtn", "gptq")] == [None, "sequential"]
    one_shot = quantize_model(model, batches, methods=("rtn", "gptq"), bits=4, progress=False)
    assert [one_shot.calibration_of(method) for method in ("rtn", "gptq")] == [None, "one-shot"]
    for bits in (4, 3):
        assert torch.equal(results.weights["rtn", bits]["stem"].codes, quantize_rtn(model, bits)["stem"].codes)


def quantize_rtn(model, bits):
    return quantize_model(model, [], methods="rtn", bits=bits, progress=False).weights["rtn", bits]


def test_a_small_budget_gives_the_same():
    torch.manual_seed(0)
    model, batches = Blocks().eval(), make_batches()
    arguments = {"methods": "gptq", "bits": 3, "sequential": True, "progress": False}
    expected = quantize_model(model, batches, **arguments)
    results = quantize_model(model, batches, **arguments, memory_budget_gib=300 / 2**30)
    assert len(results.calibration.passes) == 10
    assert_same_codes(results, {n: w.codes for n, w in expected.weights["gptq", 3].items()}, 3)


def test_layers_that_no_batch_reaches_are_an_error_or_rounded_to_nearest():
    model = Blocks()
    model.idle = nn.Linear(8, 8)
    model.eval()
    arguments = {"methods": "gptq", "bits": 3, "sequential": True, "progress": False}
    with pytest.raises(ValueError, match=r"No token reached idle during calibration"):
        quantize_model(model, make_batches(), **arguments)
    results = quantize_model(model, make_batches(), **arguments, unseen="rtn")
    assert [report.layer for report in results.fallbacks()] == ["idle"]


def test_a_step_that_runs_another_model_is_explained():
    model, other = Blocks().eval(), Blocks().eval()
    with pytest.raises(ValueError, match=r"No token reached stem, .* If step= is given, it must run the model"):
        quantize_model(model, make_batches(), methods="gptq", bits=3, step=other, sequential=True, progress=False)


def test_the_error_at_the_end_of_the_model_is_smaller_than_one_shot():
    errors = {True: 0.0, False: 0.0}
    for seed in range(8):
        torch.manual_seed(seed)
        model, batches = Blocks(8).eval(), [torch.randn(256, 4) for _ in range(4)]
        for sequential in errors:
            results = quantize_model(model, batches, methods="gptq", bits=2, sequential=sequential, progress=False)
            twin = copy.deepcopy(model)
            results.apply(twin, "gptq", 2)
            restore_float(twin)
            with torch.no_grad():
                errors[sequential] += sum((twin(x) - model(x)).square().mean().item() for x in batches)
    assert errors[True] < 0.95 * errors[False]


def test_all_outputs_are_kept_within_the_budget():
    model, batches = Derived().eval(), make_batches()
    arguments = {"methods": "gptq", "bits": 3, "sequential": True, "progress": False}
    kept = 6 * 37 * 8 * 4
    within, above = (
        quantize_model(model, batches, **arguments, memory_budget_gib=size / 2**30) for size in (kept, kept - 1)
    )
    assert within.calibration.procedure == "by block replay"
    assert "'head' is not reproduced to the bit" in above.calibration.procedure
    codes = {name: weight.codes for name, weight in above.weights["gptq", 3].items()}
    assert_same_codes(within, codes, 3)
    plain = quantize_model(Blocks().eval(), batches, **arguments, memory_budget_gib=(kept - 1) / 2**30)
    assert plain.calibration.procedure == "by block replay"  # it needs only the outputs just before


class PaddingBlock(Block):
    """Returns which rows are padding, too."""

    def forward(self, h, x):
        return super().forward(h), (x[:, 3:] == 0).all(-1)


class Masked(Blocks):
    """Makes a mask of what the first block returned."""

    def __init__(self):
        super().__init__(block=PaddingBlock)

    def forward(self, x):
        h = self.stem(x)
        for index, block in enumerate(self.blocks):
            h, padding = block(h, x)
            if index == 0:
                keep = 1.0 - padding.float()[:, None]
            del padding
            h = h * keep
        return self.head(h)


@pytest.mark.parametrize("size", [2**30, 6 * 64 * 8 * 4])
@pytest.mark.parametrize("build", [Masked, Stale])
def test_every_batch_is_tried(build, size):
    """The first and the last are alike, and do not show what is lost."""
    torch.manual_seed(0)
    model, batches = build().eval(), [torch.randn(16, 4) for _ in range(4)]
    batches[3] = batches[0].clone()
    for batch in batches[1:3]:
        batch[::2, 3:] = 0
    arguments = {"methods": "gptq", "bits": 3, "sequential": True, "progress": False}
    results = quantize_model(model, batches, **arguments, memory_budget_gib=size / 2**30)
    is_replayed = build is Masked and size == 2**30
    assert (results.calibration.procedure == "by block replay") == is_replayed
    assert_same_codes(results, codes_by_hand(model, batches, UNITS, "w3"), 3)


def test_a_layer_with_a_second_name_belongs_to_its_block():
    model = Blocks().eval()
    model.first = model.blocks[0].up
    model.flat = nn.ModuleList(block.down for block in model.blocks)
    results = quantize_model(model, make_batches(), methods="gptq", bits=3, sequential=True, progress=False)
    assert results.calibration.procedure == "by block replay"
    assert_same_codes(results, codes_by_hand(model, make_batches(), UNITS, "w3"), 3)


def test_a_model_that_catches_exceptions_and_one_that_counts_are_left_as_they_were():
    class Careful(Blocks):
        def __init__(self):
            super().__init__()
            self.is_slow = False
            self.register_buffer("mean", torch.zeros(()))

        def forward(self, x):
            x = self.stem(x)
            for block in self.blocks:
                try:
                    x = block(x)
                except Exception:
                    self.is_slow = True
                self.mean.lerp_(x.abs().mean(), 0.1)
            return self.head(x)

    for sequential in (False, True):
        model = Careful().eval()
        quantize_model(model, make_batches(), methods="gptq", bits=3, sequential=sequential, progress=False)
        assert not model.is_slow
        assert model.mean == 0


def test_batches_of_any_kind_are_not_changed_by_the_model():
    class InPlace(Blocks):
        def forward(self, batch):
            return super().forward(batch.x.mul_(1.5))

    batches = [Box(batch) for batch in make_batches()]
    expected = [batch.x.clone() for batch in batches]
    for sequential in (False, True):
        quantize_model(InPlace().eval(), batches, methods="gptq", bits=3, sequential=sequential, progress=False)
        assert all(torch.equal(batch.x, x) for batch, x in zip(batches, expected, strict=True))


def test_an_encoder_with_a_padding_mask_is_calibrated():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    x, mask = torch.randn(4, 6, 8), torch.zeros(4, 6, dtype=torch.bool)
    mask[0, 4:] = True
    for sequential in (False, True):
        results = quantize_model(
            encoder, [x], methods="gptq", bits=4, step=lambda x: encoder(x, src_key_padding_mask=mask),
            sequential=sequential, progress=False,
        )  # fmt: skip
        assert len(results.weights["gptq", 4]) == 4
        assert encoder.use_nested_tensor


def test_fingerprints_tell_tensors_apart():
    x = torch.randn(2_000_000)
    assert fingerprint((x, {"a": 1})) == fingerprint((x.clone(), {"a": 1}))
    for dtype in (torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.complex64):
        assert fingerprint(x.to(dtype)) == fingerprint(x.to(dtype))
    swapped = x.clone()
    swapped[[3, 1_500_000]] = x[[1_500_000, 3]]
    changed = x.clone()
    changed[-1] = torch.nextafter(changed[-1], torch.tensor(2.0))
    others = [swapped, changed, x[:-1], x.reshape(2, -1), x.bfloat16(), x.roll(1)]
    assert len({fingerprint(each) for each in [x, *others]}) == 7
    assert fingerprint(torch.tensor(0.0)) != fingerprint(torch.tensor(-0.0))
    assert fingerprint(torch.empty(0)) == fingerprint(torch.empty(0))
    assert fingerprint([x, Box(x)]) is None


def test_outputs_are_forgotten_when_nothing_needs_them(monkeypatch):
    from lightning_qat.nn import staged

    most = []
    finish = staged.StagedForward.finish

    def count(self, stage):
        most.append(len(self._outputs))
        finish(self, stage)

    monkeypatch.setattr(staged.StagedForward, "finish", count)
    batches = make_batches()
    arguments = {"methods": "gptq", "bits": 3, "sequential": True, "progress": False}
    quantize_model(Blocks(12).eval(), batches, **arguments, memory_budget_gib=2000 / 2**30)
    assert max(most) <= 3 * len(batches)


def quantize_on_rank(rank, folder, model):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    batches = make_batches((16, 5) if rank == 0 else (16, 16, 16))
    batches = [batch + rank for batch in batches]
    model = copy.deepcopy(model)  # what was sent is memory that the processes share
    results = quantize_model(model, batches, methods="gptq", bits=3, sequential=True, progress=False)
    codes = {name: weight.codes for name, weight in results.weights["gptq", 3].items()}
    torch.save((results.calibration.procedure, codes), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["Blocks", "Reordered"])
def test_two_processes_agree(name, tmp_path):
    torch.manual_seed(0)
    model = {**REPLAYED, "Reordered": Reordered}[name]().eval()
    torch.multiprocessing.spawn(quantize_on_rank, (str(tmp_path), model), nprocs=2)
    (procedure, codes), (other_procedure, other_codes) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert procedure == other_procedure
    assert (procedure == "by block replay") == (name == "Blocks")
    assert codes.keys() == other_codes.keys()
    assert all(torch.equal(codes[key], other_codes[key]) for key in codes)
    alone = quantize_model(model, make_batches((16, 5)), methods="gptq", bits=3, sequential=True, progress=False)
    assert not torch.equal(alone.weights["gptq", 3]["head"].codes, codes["head"])
