"""Statistics of batch normalization, computed anew."""

import copy

import pytest
import torch
from torch import nn

from lightning_qat.nn import prepare
from lightning_qat.nn.batch_norm import batch_norms, reestimate


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, momentum=0.3)
        self.conv2, self.bn2 = nn.Conv2d(8, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.dropout = nn.Dropout(0.5)
        self.unused = nn.BatchNorm2d(4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.bn2(self.conv2(self.dropout(torch.relu(self.bn1(self.conv1(x))))))


def make_net(scheme="w2"):
    torch.manual_seed(0)
    net = Net()
    prepare(net, scheme)
    for index in range(4):  # statistics that belong to something else
        net(5 + torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(50 + index)))
    return net


def batches(sizes=(6, 6, 6)):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(size, 3, 8, 8, generator=generator) for size in sizes]


def torch_reference(net, data):
    """What a cumulative average of torch gives, on a copy of which nothing else trains."""
    twin = copy.deepcopy(net).eval()
    for norm in (twin.bn1, twin.bn2):
        norm.train()
        norm.momentum = None
        norm.reset_running_stats()
    with torch.no_grad():
        for batch in data:
            twin(batch)
    return twin


@pytest.mark.parametrize("sizes", [(6, 6, 6), (6,), (8, 8, 3)])
def test_statistics_are_those_of_torch_to_the_bit(sizes):
    net, data = make_net(), batches(sizes)
    before = {name: value.clone() for name, value in net.state_dict().items() if isinstance(value, torch.Tensor)}
    modes = {name: module.training for name, module in net.named_modules()}
    reference = torch_reference(net, data)
    reestimate(net, list(batch_norms(net).values()), lambda index: net(data[index]), len(data))
    expected = dict(reference.named_buffers())
    for name, value in net.state_dict().items():
        if name.startswith(("bn1", "bn2")) and name.endswith(("running_mean", "running_var")):
            assert torch.equal(value, expected[name]), name
            assert not torch.equal(value, before[name])
        elif isinstance(value, torch.Tensor):  # weights, counters, the layer that is not called, other buffers
            assert torch.equal(value, before[name]), name
    assert modes == {name: module.training for name, module in net.named_modules()}
    assert (net.bn1.momentum, net.bn2.momentum) == (0.3, 0.1)


def test_statistics_are_the_mean_and_the_mean_variance_of_the_quantized_layers_output():
    net, data = make_net(), batches()
    reestimate(net, [net.bn1], lambda index: net(data[index]), len(data))
    outputs = torch.stack([net.conv1(batch).double() for batch in data])  # [batches, B, C, H, W]
    per_batch = outputs.transpose(1, 2).flatten(2)  # [batches, C, everything that is normalized]
    torch.testing.assert_close(net.bn1.running_mean.double(), per_batch.mean((0, 2)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(net.bn1.running_var.double(), per_batch.var(2).mean(0), rtol=1e-5, atol=1e-6)
    in_float = nn.functional.conv2d(torch.cat(data), net.conv1.weight).mean((0, 2, 3))
    assert not torch.allclose(net.bn1.running_mean, in_float, rtol=1e-2)


def test_a_failure_leaves_everything_as_it_was():
    net = make_net()
    before = {name: value.clone() for name, value in net.named_buffers()}

    def fail(index):
        net(batches()[0])
        if index == 1:
            raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        reestimate(net, list(batch_norms(net).values()), fail, 3)
    assert all(torch.equal(value, before[name]) for name, value in net.named_buffers())
    assert net.bn1.momentum == 0.3
    assert all(module.training for module in net.modules())


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_statistics_that_became_nan_are_replaced_and_those_of_a_layer_that_is_not_called_stay(broken):
    net, data = make_net(), batches()
    expected = torch_reference(net, data)
    with torch.no_grad():
        for norm in (net.bn1, net.bn2, net.unused):
            norm.running_mean.fill_(broken)
            norm.running_var.fill_(7.0)
    reestimate(net, list(batch_norms(net).values()), lambda index: net(data[index]), len(data))
    for name in ("bn1", "bn2"):
        for statistic in ("running_mean", "running_var"):
            found, wanted = (each.get_submodule(name).get_buffer(statistic) for each in (net, expected))
            assert torch.equal(found, wanted)
    assert net.unused.running_mean.tolist() == pytest.approx([broken] * 4, nan_ok=True)
    assert net.unused.running_var.tolist() == [7.0] * 4


def test_processes_are_averaged():
    net, data = make_net(), batches()
    alone = torch_reference(net, data)
    reestimate(net, [net.bn1, net.bn2], lambda index: net(data[index]), 3, average=lambda statistic: statistic / 2)
    assert torch.equal(net.bn2.running_var, alone.bn2.running_var / 2)


def test_only_batch_normalization_with_statistics_is_found():
    class FrozenBatchNorm(nn.Module):  # as in torchvision
        def __init__(self):
            super().__init__()
            self.register_buffer("running_mean", torch.zeros(3))
            self.register_buffer("running_var", torch.ones(3))

    found = {
        "plain": nn.BatchNorm1d(3),
        "no affine": nn.BatchNorm2d(3, affine=False),
        "cumulative": nn.BatchNorm3d(3, momentum=None),
        "synchronized": nn.SyncBatchNorm(3),
        "lazy": nn.LazyBatchNorm2d(),
    }
    others = {
        "instance": nn.InstanceNorm2d(3, track_running_stats=True),
        "no statistics": nn.BatchNorm2d(3, track_running_stats=False),
        "group": nn.GroupNorm(1, 3),
        "frozen": FrozenBatchNorm(),
    }
    assert set(batch_norms(nn.ModuleDict({**found, **others}))) == set(found)
