import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_qat.core import QuantScheme, fitting_group_sizes


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("w4", {"num_bits": 4, "granularity": "channel"}),
        ("w4g128", {"num_bits": 4, "granularity": "group", "group_size": 128}),
        ("W3G64", {"num_bits": 3, "group_size": 64}),
        ("w4-tensor", {"granularity": "tensor"}),
        ("w3g64-asym", {"symmetric": False}),
        ("w2g32-nozero", {"zero_offset": 0.5, "scale_rule": "cell_range"}),
        ("w4g32-bf16", {"scale_dtype": "bfloat16"}),
        ("w4g32-pad", {"pad_last_group": True}),
        ("w4-qmax", {"scale_rule": "qmax"}),
        ("w1.58", {"num_bits": 1.58, "scale_rule": "cell_range"}),
        ("w1", {"num_bits": 1, "zero_offset": 0.5}),
        ("w4a16", {"activation": None}),
    ],
)
def test_shorthand_sets_the_fields(text, fields):
    scheme = QuantScheme.parse(text)
    assert {name: getattr(scheme, name) for name in fields} == fields


def test_activation_shorthand_is_dynamic_per_token_and_asymmetric():
    activation = QuantScheme.parse("w4g128a8").activation
    assert (activation.num_bits, activation.granularity, activation.symmetric) == (8, "token", False)
    assert QuantScheme.parse("w8a8-actsym").activation.symmetric


def test_activation_shorthand_may_be_static():
    scheme = QuantScheme.parse("w4g128a8-static")
    assert scheme.has_static_activation
    assert (scheme.activation.granularity, scheme.activation.symmetric) == ("tensor", False)
    assert QuantScheme.parse("w8a8-actsym-static").activation.symmetric
    assert str(QuantScheme.parse("w8a8-actsym-static")) == "w8a8-static-actsym"
    assert scheme.activation.describe_as_input() == "8 bits per tensor (static), asymmetric"
    assert not QuantScheme.parse("w4a8").has_static_activation
    assert QuantScheme.parse("w2a4-static").at(8).activation == QuantScheme(8, symmetric=False, granularity="tensor")


@given(
    bits=st.sampled_from([1, 1.58, 2, 3, 4, 5, 6, 7, 8]),
    group=st.none() | st.integers(1, 512),
    activation=st.none() | st.integers(2, 8),
    flags=st.sets(st.sampled_from(["asym", "bf16", "pad", "nozero", "qmax", "signed_max", "static", "actsym"])),
)
def test_shorthand_and_dict_round_trip(bits, group, activation, flags):
    text = f"w{bits:g}" + (f"g{group}" if group else "") + (f"a{activation}" if activation else "")
    try:
        scheme = QuantScheme.parse("-".join([text, *sorted(flags)]))
    except ValueError:
        return  # a contradiction
    assert QuantScheme.parse(str(scheme)) == scheme
    assert QuantScheme.parse(scheme.to_dict()) == scheme


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("w9", "num_bits=9"),
        ("w0", "num_bits=0"),
        ("w1.5", "num_bits=1.5"),
        ("int4", "Write for example 'w8', 'w4g128'"),
        ("w4g", "Cannot read the scheme"),
        ("w4-asymm", "flags: tensor, asym"),
        ("w4-nozero", "for 1 and 2 bits"),
        ("w2-nozero-signed_max", "has the scale_rule 'cell_range' or 'half_range'"),
        ("w1-qmax", "has the scale_rule 'cell_range' or 'half_range'"),
        ("w2-nozero-asym", "leave zero_offset and scale_rule out"),
        ({"num_bits": 4, "granularity": "group"}, "contradict each other"),
        ({"num_bits": 4, "granularity": "channel", "group_size": 32}, "contradict each other"),
        ({"num_bits": 4, "group_size": 0}, "positive whole number"),
        ({"num_bits": 4, "granularity": "row"}, "granularity='row' is not one of"),
        ({"num_bits": 4, "scale_dtype": "float8"}, "scale_dtype='float8' is not one of"),
        ({"num_bits": 4, "pad_last_group": True}, "needs a group_size"),
        ({"num_bits": 4, "activation": {"num_bits": 8, "granularity": "channel"}}, "granularity='token'"),
        (
            {"num_bits": 4, "activation": {"num_bits": 1.58, "granularity": "tensor", "symmetric": True}},
            "2 bits or more",
        ),
        ({"num_bits": 4, "activation": {"num_bits": 1, "symmetric": True}}, "2 bits or more"),
        ("w4a1-static", "activations have 2 bits or more"),
        ("w4-static", "write their bits, as in 'w4a8-static'"),
        ("w4a16-static", "write their bits, as in 'w4a8-static'"),
    ],
)
def test_bad_schemes_are_refused_with_the_reason(spec, message):
    with pytest.raises(ValueError, match=message):
        QuantScheme.parse(spec)


@pytest.mark.parametrize("spec", [4, None, {"bits": 4}, {"num_bits": 4, "groupsize": 32}])
def test_wrong_types_and_fields_are_refused(spec):
    with pytest.raises(TypeError, match=r"QuantScheme or its shorthand|takes the fields"):
        QuantScheme.parse(spec)


def test_schemes_are_frozen_and_hashable():
    scheme = QuantScheme(num_bits=4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        scheme.num_bits = 3
    assert {scheme: 1}[QuantScheme.parse("w4")] == 1


def test_a_rung_never_goes_below_the_own_width_and_has_the_plain_grid_above_it():
    scheme = QuantScheme.parse("w2g32a8-nozero")
    assert str(scheme.at(8)) == "w8g32a8"
    assert str(scheme.at(16).activation) == "16 bits per token, asymmetric"
    assert scheme.at(2) == scheme
    assert scheme.at(1.58) == scheme


def test_stated_scale_rule():
    assert QuantScheme.parse("w4").levels().scale_divisor == 7.5
    assert QuantScheme.parse("w4-qmax").levels().scale_divisor == 7
    assert QuantScheme.parse("w4-cell_range").levels().scale_divisor == 8
    assert QuantScheme.parse("w2-nozero").levels().scale_divisor == 2


def test_group_that_does_not_divide_is_refused_with_sizes_that_fit():
    with pytest.raises(ValueError, match=r"does not divide in_features=172; sizes that do: \[172, 86, 43\]"):
        QuantScheme.parse("w4g32").num_groups(172)
    assert QuantScheme.parse("w4g32-pad").num_groups(172) == 6
    assert fitting_group_sizes(64) == [64, 32, 16, 8]


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("w4", 4 + 32 / 256),
        ("w4g128", 4 + 32 / 128),
        ("w4g128-bf16", 4 + 16 / 128),
        ("w4g64-asym-fp16", 4 + (16 + 4) / 64),
        ("w4-tensor", 4 + 32 / (8 * 256)),
        ("w4g96-pad", 4 + 3 * 32 / 256),
    ],
)
def test_effective_bits_count_scales_and_zero_points(text, bits):
    assert QuantScheme.parse(text).at(16).effective_bits(8, 256) == 16
    assert QuantScheme.parse(text).effective_bits(8, 256) == pytest.approx(bits)
