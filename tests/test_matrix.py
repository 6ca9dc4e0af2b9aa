"""A slice of the table, another one every day; and that the table would notice."""

import datetime
import os

import pytest
import torch

import kvplug
from kvplug.layers.growing import Layer
from kvplug.testing import matrix
from kvplug.testing.architectures import ARCHITECTURES
from kvplug.testing.calls import CALLS
from kvplug.testing.matrix import ALTERNATIVES, STRATEGIES, Cell, Row, a_slice, cells

SEED = os.environ.get("KVPLUG_MATRIX_SEED") or datetime.date.today().isoformat()


def outcome(*cell):
    result = Row(cell[0]).run(Cell(*cell))
    return result.outcome, result.reason


@pytest.fixture(scope="module")
def llama():
    return Row("llama")


@pytest.mark.canary
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_strategy_generates(llama, strategy):
    assert llama.run(Cell("llama", "greedy", strategy)).outcome in ("exact", "bound")


@pytest.mark.parametrize("cell", a_slice(SEED, 40), ids=str)
def test_slice(cell):
    """Set KVPLUG_MATRIX_SEED to the date of a run to repeat its slice."""
    result = Row(cell.architecture).run(cell)
    assert result.outcome in ("exact", "bound", "refused", "n/a"), (
        f"{result.outcome}: {result.reason}\n{cell.command}"
    )


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        # masks are left out of a step whose cache says that it does not compile
        ("diffllama / crop, go on / static+int4", ("bound", "")),
        ("lfm2, conv hybrid / prompt lookup / static", ("exact", "")),
        ("mistral, sliding / crop, go on / static", ("exact", "")),
        # what empty room, or fewer columns than tokens, would spoil in the model's own code
        ("gpt_neo, local / greedy / static", ("refused", "last column")),
        ("falcon, multi-query / output_attentions / static", ("refused", "'eager'")),
        ("falcon, alibi / greedy / static", ("refused", "alibi")),
        # of the columns of an image none is dropped, and no room is reserved for more
        ("mllama, cross-attention / picture or sound / static", ("exact", "")),
        ("mllama, cross-attention / picture or sound / static+int4", ("bound", "")),
        ("mllama, cross-attention / picture or sound / sinks", ("bound", "")),
        # of values that a model takes apart itself, each group of heads has its own
        ("diffllama / left-padded batch / heads", ("refused", "none came by")),
        # decoders, of which no model can be built alone
        ("whisper / beams / sinks", ("bound", "")),
        ("moonshine / greedy / sinks", ("bound", "")),
        ("t5gemma, sliding / greedy / sinks+int8", ("bound", "")),
        # more room than the first turn asked for
        ("llama / second turn / static", ("exact", "")),
        ("gemma3, sliding / second turn / static+int4", ("bound", "")),
    ],
)
def test_cells_that_were_wrong_or_crashed(cell, expected):
    found, reason = outcome(*cell.split(" / "))
    if found == "n/a":  # an older transformers cannot do it with its own cache
        pytest.skip(reason)
    assert found == expected[0], reason
    assert expected[1] in reason


def test_a_slice_is_the_same_for_a_seed_and_meets_many_architectures():
    assert a_slice("a", 40) == a_slice("a", 40) != a_slice("b", 40)
    assert len({cell.architecture for cell in a_slice("a", 40)}) == 40
    assert sorted(map(str, a_slice("a", 10**6))) == sorted(map(str, cells()))


def test_the_table_has_each_strategy_or_one_of_its_alternatives():
    for names in (*ALTERNATIVES, *([x] for x in STRATEGIES if x not in sum(ALTERNATIVES, ()))):
        met = [c for c in cells() if c.strategy in names]
        assert len(met) == len(ARCHITECTURES) * len(CALLS)
        assert {c.strategy for c in met} == set(names)


def test_strategies_are_specs():
    assert all(kvplug.parse(spec) for spec in STRATEGIES.values())


@pytest.mark.parametrize("strategy", ["int8", "int4+host", "static+int4"])
def test_a_decoder_that_is_off_is_wrong(monkeypatch, strategy):
    kind = type(kvplug.parse(STRATEGIES[strategy]).codec)
    decode = kind.decode

    def off(self, data):
        keys, values = decode(self, data)
        return keys, values * 1.5

    monkeypatch.setattr(kind, "decode", off)
    assert outcome("llama", "greedy", strategy)[0] == "wrong"


def test_a_window_that_is_one_short_is_wrong(monkeypatch):
    first = Layer._first_visible
    monkeypatch.setattr(Layer, "_first_visible", lambda self, n=0: max(0, first(self, n) + 1))
    assert outcome("llama", "greedy", "window")[0] == "wrong"


def test_a_kernel_that_is_off_is_wrong(monkeypatch):
    kernel = type(kvplug.parse("reference").kernel)
    attend = kernel.attend

    def off(self, *args):
        out, lse = attend(self, *args)
        return out * 1.01, lse

    monkeypatch.setattr(kernel, "attend", off)
    monkeypatch.setitem(STRATEGIES, "int8", "int8(block=8)+reference")
    found, reason = outcome("llama", "greedy", "int8")
    assert (found, "attention is" in reason) == ("wrong", True)


def test_padding_that_is_not_told_is_wrong(monkeypatch):
    monkeypatch.setattr(kvplug.Cache, "set_padding", lambda self, mask: None)
    assert outcome("llama", "left-padded batch", "sinks")[0] == "wrong"


def test_an_error_of_ours_is_a_refusal_only_before_the_model_ran(monkeypatch):
    def refuse(self, *args):
        raise kvplug.SpecError("not today")

    monkeypatch.setattr(matrix.CALLS["greedy"].__globals__["Caller"], "inputs", refuse)
    row = Row.__new__(Row)
    row.name, row.absent, row.model = "llama", None, matrix.make("llama")
    row.caller = matrix.Caller("llama", ARCHITECTURES["llama"], row.model)
    row.expected = {"greedy": matrix.Run(torch.zeros(1, 1), ())}
    assert row.run(Cell("llama", "greedy", "int8")).outcome == "refused"
    monkeypatch.undo()
    monkeypatch.setattr(Layer, "update", refuse_update)
    assert row.run(Cell("llama", "greedy", "int8")).outcome == "crashed"


def refuse_update(self, *args, **kwargs):
    raise kvplug.SpecError("too late")


def test_any_other_error_is_a_crash(monkeypatch):
    def fails(self, *args, **kwargs):
        raise RuntimeError("oops")

    monkeypatch.setattr(Layer, "get_mask_sizes", fails)
    found, reason = outcome("llama", "greedy", "int8")
    assert found == "crashed"
    assert "oops" in reason


def test_command_line_and_document(tmp_path, capsys):
    assert matrix.main(["--cell", "llama / greedy / growing"]) == 0
    assert capsys.readouterr().out.startswith("exact  llama / greedy / growing")
    results = [Row("llama").run(c) for c in (Cell("llama", "greedy", "int8"),)]
    results.append(matrix.Result(Cell("t5", "beams", "static"), "refused", "no 12 tokens"))
    results.append(matrix.Result(Cell("t5", "greedy", "static"), "refused", "no 13 tokens"))
    from kvplug.testing.compatibility import document

    text = document(results, 60.0)
    assert "| `≈` | bound | 1 | 33.3 % |" in text
    assert "1. R1: no 12 tokens\n   - strategy: static\n   - call: beams, greedy\n" in text
    assert "| t5 |  | R2 <sup>R1</sup> |" in text
