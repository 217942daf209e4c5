"""Checkpoints that are cut off, altered, made to run code, or of another model: an error, and nothing is touched."""

import copy
import io
import os
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_qat import QATCallback, load_qat, quantized_weights
from lightning_qat.files import read_checkpoint
from lightning_qat.nn import quantized_layers
from lightning_qat.nn.state import STATE_KEY
from tests.helpers import TinyTask, fit, loader, make_trainer

OPTIONS = {"scheme": "w4a8-static", "scale_lr": 1e-3, "activation_calibration_steps": 2, "schedule": [8, 4]}


@pytest.fixture(scope="module")
def saved():
    """The bytes of a sound checkpoint."""
    task, buffer = TinyTask(), io.BytesIO()
    trainer = fit(task, QATCallback(**OPTIONS), max_steps=6)
    torch.save(trainer._checkpoint_connector.dump_checkpoint(), buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def content(saved):
    return torch.load(io.BytesIO(saved), weights_only=True)


def is_untouched(task):
    fresh = TinyTask(seed=9).state_dict()
    return not quantized_layers(task) and all(torch.equal(value, fresh[k]) for k, value in task.state_dict().items())


def assert_refused(checkpoint, message="."):
    task = TinyTask(seed=9)
    with pytest.raises(ValueError, match=message):
        load_qat(task, checkpoint)
    assert is_untouched(task)


def codes_of(task):
    return {name: weight.codes for name, weight in quantized_weights(task).items()}


def test_a_sound_file_is_read(saved, tmp_path):
    path = tmp_path / "sound.ckpt"
    path.write_bytes(saved)
    assert len(codes_of(load_qat(TinyTask(seed=9), path))) == 2


@pytest.mark.parametrize("seed", range(40))
def test_a_bit_that_is_turned_over_changes_nothing_or_is_noticed(seed, saved, tmp_path):
    """torch.load would have gone on with most of them."""
    generator, altered = random.Random(seed), bytearray(saved)
    altered[generator.randrange(len(altered))] ^= 1 << generator.randrange(8)
    path = tmp_path / "altered.ckpt"
    path.write_bytes(altered)
    task = TinyTask(seed=9)
    try:
        load_qat(task, path)
    except ValueError:
        assert is_untouched(task)
    else:
        expected = codes_of(load_qat(TinyTask(seed=9), torch.load(io.BytesIO(saved), weights_only=True)))
        assert all(torch.equal(codes, expected[name]) for name, codes in codes_of(task).items())


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_an_altered_weight_is_noticed_before_training_goes_on(saved, tmp_path):
    weight = torch.load(io.BytesIO(saved), weights_only=True)["state_dict"]["net.0.weight"]
    position = saved.index(weight.numpy().tobytes())
    path = tmp_path / "altered.ckpt"
    path.write_bytes(saved[:position] + bytes([saved[position] ^ 64]) + saved[position + 1 :])
    assert torch.load(path, weights_only=True)  # torch does not notice
    assert_refused(path, "the checksum of .* is wrong")
    for stage in ("fit", "validate"):
        with pytest.raises(ValueError, match=r"the checksum of .* is wrong.*Take another checkpoint"):
            getattr(make_trainer(QATCallback(**OPTIONS)), stage)(TinyTask(), loader(2), ckpt_path=path)


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
def test_a_file_that_is_cut_off(share, saved, tmp_path):
    path = tmp_path / "cut.ckpt"
    path.write_bytes(saved[: int(len(saved) * share)])
    assert_refused(path, "cut off or damaged")
    with pytest.raises((ValueError, EOFError, RuntimeError, OSError)):  # Lightning's own, which reads it first
        fit(TinyTask(), QATCallback(**OPTIONS), max_steps=9, ckpt_path=path)


@pytest.mark.parametrize("bytes_", [b"no checkpoint at all", b"PK\x03\x04", b"\x80\x02."])
def test_a_file_of_another_kind(bytes_, tmp_path):
    path = tmp_path / "other.ckpt"
    path.write_bytes(bytes_)
    assert_refused(path, "no checkpoint|cut off or damaged")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_qat(TinyTask(), tmp_path / "nothing.ckpt")


class Evil:
    """Runs code when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
@pytest.mark.parametrize("place", ["hyper_parameters", STATE_KEY, "callbacks", "state_dict"])
def test_code_in_a_file_is_not_run(place, content, tmp_path):
    path, proof = tmp_path / "evil.ckpt", tmp_path / "proof"
    torch.save({**content, place: {**content.get(place, {}), "evil": Evil(proof)}}, path)
    assert_refused(path, "could run code.*nothing was.*weights_only=False")
    for stage in ("fit", "validate"):
        with pytest.raises(Exception, match=r"[Ww]eights.only"):
            getattr(make_trainer(QATCallback(**OPTIONS)), stage)(TinyTask(), loader(2), ckpt_path=path)
    assert not proof.exists()
    torch.load(path, weights_only=False)
    assert proof.exists()  # the file would have done it


def test_what_a_file_holds_besides_plain_data_is_named(content, tmp_path):
    path = tmp_path / "evil.ckpt"
    torch.save({**content, "callbacks": {"evil": Evil(tmp_path / "proof")}}, path)
    assert_refused(path, r"nothing was \(.*GLOBAL posix\.mkdir .*\)\. If you trust who made it")


@pytest.mark.parametrize("name", ["net.0.weight", "net.2.bias"])
def test_a_diverged_run_is_refused_and_leaves_the_module_alone(name, content, tmp_path):
    content = {**content, "state_dict": {**content["state_dict"], name: content["state_dict"][name] * float("nan")}}
    path = tmp_path / "nan.ckpt"
    torch.save(content, path)
    assert_refused(path, f"holds NaN in {name}")


def test_going_on_without_the_callback_is_warned_of(content, tmp_path):
    path = tmp_path / "good.ckpt"
    torch.save(content, path)
    with pytest.warns(UserWarning, match="add the following callbacks: .*QATCallback"):
        make_trainer().validate(TinyTask(), loader(2), ckpt_path=path, verbose=False)


def test_content_that_is_no_mapping(tmp_path):
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match="holds a list"):
        read_checkpoint(tmp_path / "list.ckpt")


def paths_in(tree, prefix=()):
    """Yield the path of every entry of nested mappings."""
    for key, value in tree.items():
        yield (*prefix, key)
        if isinstance(value, dict):
            yield from paths_in(value, (*prefix, key))


WRONG = [None, "x", -1, 1e30, [], {}, {"y": 1}, torch.zeros(3), torch.full((32,), torch.nan)]


@settings(max_examples=250, deadline=None, derandomize=True)
@given(index=st.integers(0, 10_000), wrong=st.sampled_from(["nothing", *WRONG]))
@pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning")
def test_state_that_was_altered_is_refused_or_means_what_it_says(index, wrong, content):
    """Any entry taken away or replaced by something of another kind."""
    altered = copy.deepcopy(content)
    paths = sorted(paths_in(content[STATE_KEY]), key=str)
    *parents, last = paths[index % len(paths)]
    holder = altered[STATE_KEY]
    for key in parents:
        holder = holder[key]
    if isinstance(wrong, str) and wrong == "nothing":
        del holder[last]
    else:
        holder[last] = copy.deepcopy(wrong)
    task = TinyTask(seed=9)
    try:
        load_qat(task, altered)
    except ValueError:
        assert is_untouched(task)
    else:
        assert all(weight.dequantize().isfinite().all() for weight in quantized_weights(task).values())


@pytest.mark.parametrize("part", ["state_dict", STATE_KEY])
def test_a_part_that_is_missing(part, content):
    assert_refused({key: value for key, value in content.items() if key != part})


def test_a_checkpoint_of_another_model_leaves_the_module_alone(content):
    class Other(TinyTask):
        def __init__(self):
            super().__init__()
            self.net[2] = nn.Linear(32, 4)

    task = Other()
    before = copy.deepcopy(task.state_dict())
    with pytest.raises(ValueError, match="does not fit the module"):
        load_qat(task, content)
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())
    assert not quantized_layers(task)
