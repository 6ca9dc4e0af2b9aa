"""Strategies as text: the grammar, round trips, presets, and every error with its words."""

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvplug
from kvplug.spec import DEFAULTS, PREFIX, PRESETS

RETENTION = st.one_of(
    st.just("full"),
    st.integers(1, 10**6).map(lambda n: f"window(length={n})"),
    st.builds("sinks(sinks={}, window={})".format, st.integers(1, 9), st.integers(1, 9999)),
    st.sampled_from(["window", "sinks", "sinks(window=5)"]),
)
LAYOUT = st.sampled_from(["growing", "growing()", "static", "static(max_cache_len=99)"])
CODEC = st.one_of(
    st.sampled_from(["exact", "int8", "int4()", "int2", "int", "int4(k_bits=4, v_bits=4)"]),
    st.builds(
        "int(block={}, group={}, tail={}, k_bits={}, v_bits={})".format,
        st.sampled_from([8, 16, 64, 256]),
        st.integers(1, 512),
        st.integers(0, 512),
        st.sampled_from([2, 3, 4, 5, 6, 8]),
        st.sampled_from([2, 3, 4, 5, 6, 8]),
    ),
)
PLACEMENT = st.sampled_from(["device", "host", "disk", "disk(folder=None)", "disk(folder='/tmp')"])
KERNEL = st.sampled_from(["auto", "reference"])


@given(
    stages=st.tuples(RETENTION, LAYOUT, CODEC, PLACEMENT, KERNEL),
    given_=st.lists(st.booleans(), min_size=5, max_size=5),
    order=st.permutations(range(5)),
    space=st.sampled_from(["+", " + ", "+ "]),
    prefix=st.sampled_from(["", PREFIX]),
    by_layer=st.one_of(
        st.just([]),
        st.lists(
            st.tuples(CODEC, st.sampled_from([0, -1, (3,), (5, -2), "(7;8)"])),
            unique_by=lambda x: x[1],
            max_size=3,
        ),
    ),
)
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
def test_repr_and_str_parse_back(stages, given_, order, space, prefix, by_layer):
    words = [stages[i] for i in order if given_[i]] or ["growing"]
    if words == ["auto"]:  # a choice of the whole strategy
        words.append("device")
    at = [f"{codec}@{layers}" for codec, layers in by_layer]
    words[1:1] = at
    strategy = kvplug.parse(prefix + space.join(words))
    assert kvplug.parse(repr(strategy)) == strategy
    assert kvplug.parse(str(strategy)) == strategy
    assert kvplug.parse(PREFIX + repr(strategy)) == strategy
    assert hash(kvplug.parse(repr(strategy))) == hash(strategy)
    assert len(str(strategy)) <= len(repr(strategy))
    assert len(strategy.by_layer) == len(by_layer)
    for stage in strategy.stages():
        named = any(w.partition("(")[0] == stage.name for w in words)
        assert named or stage.name == DEFAULTS[stage.kind]


def test_what_is_left_out_takes_the_default():
    full = "full()+growing()+exact(block=64, tail=0)+device()+auto()"
    assert repr(kvplug.parse("growing")) == full
    assert str(kvplug.parse(full)) == "growing"
    assert str(kvplug.parse("host+int4(tail=32, group=16)")) == "int4(group=16)+host"


@pytest.mark.parametrize(
    ("spec", "commas"),
    [
        ("sinks(sinks=4;window=1020)+int8", "sinks(sinks=4, window=1020)+int8"),
        ("int4(group=16; tail=8, block=32)", "int4(group=16, tail=8, block=32)"),
        ("kvplug:int4(group=16;tail=8)", "int4(group=16, tail=8)"),
    ],
)
def test_a_semicolon_does_for_the_comma(spec, commas):
    strategy = kvplug.parse(spec)
    assert strategy == kvplug.parse(commas)
    assert ";" not in repr(strategy)


@pytest.mark.parametrize("name", ["a;b", "it's; here", 'two "quoted; words"', "one \\; here"])
def test_a_semicolon_in_a_string_is_part_of_the_value(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    strategy = kvplug.parse(f"int4(group=16;tail=8)+disk(folder={str(folder)!r})")
    assert strategy.placement.folder == str(folder)
    assert kvplug.parse(repr(strategy)) == strategy


@pytest.mark.parametrize(("preset", "spec"), PRESETS.items())
def test_presets(preset, spec):
    assert kvplug.parse(preset) == kvplug.parse(spec)


def test_presets_are_the_documented_ones():
    assert set(PRESETS) == {
        "kvplug:static",
        "kvplug:sliding_window",
        "kvplug:quantized",
        "kvplug:offloaded",
    }
    assert kvplug.parse("kvplug:sliding_window").retention.name == "window"
    assert kvplug.parse("kvplug:quantized").codec.name == "int4"
    assert kvplug.parse("kvplug:offloaded").placement.name == "host"


@pytest.mark.parametrize(
    ("spec", "short"),
    [
        ("int4+int8@(0, 29)", "int4+int8@(0, 29)"),
        ("int8@0", "int8@0"),
        ("int8@(-1,) + host", "host+int8@-1"),
        ("int8(block=8)@(0;1)+int2@-1+growing+int4", "int4+int8(block=8)@(0, 1)+int2@-1"),
    ],
)
def test_codecs_of_single_layers(spec, short):
    strategy = kvplug.parse(spec)
    assert str(strategy) == short
    assert repr(strategy).endswith(
        "+".join(
            f"{codec!r}@{layers if len(layers) > 1 else layers[0]}"
            for codec, layers in strategy.by_layer
        )
    )


def test_inside_a_spec_auto_is_the_kernel():
    assert kvplug.parse("int4+auto") == kvplug.parse("int4")
    assert kvplug.parse("auto+growing") == kvplug.parse("growing")


def test_arguments_by_name():
    config = {"group": 16, "tail": 128}
    before = copy.deepcopy(config)
    strategy = kvplug.parse("int4+host", config)
    assert strategy == kvplug.parse("int4(group=16, tail=128)+host")
    assert config == before
    assert kvplug.parse("window+int8", {"length": 7, "block": 8}) == kvplug.parse(
        "window(length=7)+int8(block=8)"
    )
    assert kvplug.parse("int+host", {"k_bits": 8}).codec.k_bits == 8
    assert kvplug.parse("kvplug:quantized", {"tail": 8}).codec.tail == 8
    assert kvplug.parse("int4", {}) == kvplug.parse("int4", None) == kvplug.parse("int4")


ERRORS = {
    # unknown stage
    "imt8": "unknown cache stage 'imt8'. Did you mean 'int8'? Known: expected, full, h2o,",
    "INT8": "unknown cache stage 'INT8'. Did you mean 'int8'?",
    "int4+hots": "unknown cache stage 'hots'. Did you mean 'host'?",
    "kvplug:sttic": "unknown cache stage 'sttic'. Did you mean 'static'?",
    "qqqqqq": "unknown cache stage 'qqqqqq'. Known: ",
    # two of a kind
    "int4+int8": "'int4+int8': two stages of kind codec, 'int4' and 'int8'; give one, "
    "or give one to single layers: 'int8@0'",
    "window+int4+sinks": "two stages of kind retention, 'window' and 'sinks'; give one",
    "host+host": "two stages of kind placement, 'host' and 'host'; give one",
    # single layers
    "int4+int8@host": "after '@' stands the number of a layer, or several as in '@(0, -1)', not "
    "'host'",
    "int8@()": "after '@' stands the number of a layer, or several as in '@(0, -1)', not '()'",
    "int8@1.5": "not '1.5'",
    "int8@True": "not 'True'",
    "int8@[0, 1]": "not '[0, 1]'",
    "int8@0@1": "'int8 @ 0' is not a stage name",
    "0@int8": "not 'int8'",
    "int4+host@0": "'int4+host@0': only codecs are given to single layers, and 'host' is of kind "
    "placement: write it without '@'",
    "int4+sinks(sinks=4)@(0, 1)": "and 'sinks' is of kind retention: write it without '@'",
    "int4+imt8@0": "unknown cache stage 'imt8'. Did you mean 'int8'?",
    "int4+int8@(0, 1)+int2@(2, 1)": "int4+int8@(0, 1)+int2@(2, 1): layer 1 is named twice",
    "int4+int8@(3, 3)": "int4+int8@(3, 3): layer 3 is named twice",
    "int4+int8(group=0)@0": "int8(group=0): group must be at least 1",
    # reserved
    # arguments
    "int4(grup=3)": "unknown argument of 'int4': 'grup'. Did you mean 'group'? "
    "Known: block, tail, group, first, k_bits, v_bits, calibration, strict.",
    "device(x=3)": "unknown argument of 'device': 'x'. It takes none.",
    "int4(group='a')": "int4(group='a'): group must be int",
    "int4(group=2.5)": "int4(group=2.5): group must be int",
    "int4(group=True)": "int4(group=True): group must be int",
    "int4(group=None)": "int4(group=None): group must be int",
    "static(max_cache_len='a')": "static(max_cache_len='a'): max_cache_len must be int or None",
    "int4(group=0)": "int4(group=0): group must be at least 1",
    "int4(tail=-1)": "int4(tail=-1): tail must be at least 0",
    "int4(block=7)": "int4(block=7): block must be one of 8, 16, 32, 64, 128, 256",
    "int(k_bits=7)": "int(k_bits=7): k_bits must be one of 2, 3, 4, 5, 6, 8",
    "int8(k_bits=2)": "int8(k_bits=2): 'int8' has 8 bits for keys and 8 for values; "
    "write 'int(tail=0, k_bits=2, v_bits=8)'",
    "window(length=0)": "window(length=0): length must be at least 1",
    "sinks(sinks=0)": "sinks(sinks=0): sinks must be at least 1",
    "disk(folder=3)": "disk(folder=3): folder must be str or None",
    # syntax
    "": "cannot read cache strategy '': ",
    "int4+": "cannot read cache strategy 'int4+': ",
    "int4 int8": "cannot read cache strategy 'int4 int8': ",
    "int4(": "cannot read cache strategy 'int4(': ",
    "int4-int8": "'int4 - int8' is not a stage name",
    "int4;host": "cannot read cache strategy 'int4;host': '(int4, host)' is not a stage name",
    "int4(group=16;;tail=8)": "cannot read cache strategy 'int4(group=16;;tail=8)': ",
    "3": "'3' is not a stage name",
    "a.b": "'a.b' is not a stage name",
    "int4(32)": "'int4(32)' has an argument without a name",
    "int4(**{})": "'int4(**{})' unpacks arguments",
    "int4(group=f())": "group=f() is not a literal",
    "int4(group=x)": "group=x is not a literal",
    "int4(group=1)(tail=2)": "is not a stage name",
    "int4(group=1, group=2)": "'int4(group=1, group=2)' gives 'group' twice",
    "kvplug:": "cannot read cache strategy 'kvplug:'",
}


@pytest.mark.parametrize("spec", ERRORS)
def test_errors_say_what_is_wrong(spec):
    with pytest.raises(kvplug.SpecError) as e:
        kvplug.parse(spec)
    assert ERRORS[spec] in str(e.value)
    assert isinstance(e.value, ValueError)


@pytest.mark.parametrize("spec", [None, 3, ["int4"], b"int4"])
def test_a_spec_is_text(spec):
    with pytest.raises(kvplug.SpecError, match="a cache strategy is a string such as"):
        kvplug.parse(spec)


@pytest.mark.parametrize(
    ("spec", "config", "text"),
    [
        ("int4", {"grup": 3}, "unknown argument of 'int4': 'grup'. Did you mean 'group'?"),
        ("int4(group=8)", {"group": 8}, "'group' is given twice, in the spec and as an argument"),
        ("int4", {"length": 8}, "unknown argument of 'int4': 'length'"),
        ("int4", {"group": 0}, "group must be at least 1"),
        ("int4", {"group": "x"}, "group must be int"),
        ("int4", {"k_bits": 8}, "'int4' has 4 bits for keys and 4 for values; write 'int(k_bits=8"),
    ],
)
def test_errors_of_arguments_by_name(spec, config, text):
    before = dict(config)
    with pytest.raises(kvplug.SpecError) as e:
        kvplug.parse(spec, config)
    assert text in str(e.value)
    assert config == before


def test_an_argument_of_two_stages_is_ambiguous(monkeypatch):
    from dataclasses import dataclass
    from typing import ClassVar

    from kvplug.registry import REGISTRIES

    @dataclass(frozen=True)
    class Grouped(kvplug.Retention):
        name: ClassVar[str] = "grouped"
        group: int = kvplug.option(3, "clashes with the codec's")

    monkeypatch.setitem(REGISTRIES["retention"]._targets, "grouped", Grouped)
    with pytest.raises(kvplug.SpecError, match="'group' belongs to 'grouped' and 'int4'; write it"):
        kvplug.parse("grouped+int4", {"group": 8})
    assert kvplug.parse("grouped(group=5)+int4(group=8)").retention.group == 5


def test_a_float_option_takes_an_integer():
    from dataclasses import dataclass
    from typing import ClassVar

    @dataclass(frozen=True)
    class Part(kvplug.Retention):
        name: ClassVar[str] = "part"
        share: float = kvplug.option(0.5, "of the tokens", ge=0)

    assert Part(share=1).share == 1
    with pytest.raises(kvplug.SpecError, match="share must be float"):
        Part(share="1")


def test_nothing_in_a_spec_is_evaluated(tmp_path):
    target = tmp_path / "written"
    with pytest.raises(kvplug.SpecError, match="is not a literal"):
        kvplug.parse(f"int4(group=open({str(target)!r}, 'w'))")
    assert not target.exists()


@pytest.mark.parametrize("config", ["int4", ["group", 32], 0, []])
def test_arguments_that_are_no_dict(config):
    with pytest.raises(
        kvplug.SpecError, match="cache_config holds the arguments of 'int4' by name"
    ):
        kvplug.parse("int4", config)
