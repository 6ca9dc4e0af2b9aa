"""Keys: the same for the same thing in every process, another for anything that matters."""

import json

import pytest
import torch
from fresh import fresh
from hypothesis import given
from hypothesis import strategies as st

import kvplug
from kvplug.store import keys, weights
from kvplug.testing.tools import tiny_llama

ROOT = bytes(range(32))


def root(model=None, spec="int4", chunk=64, salt="", **more):
    return keys.root(model or tiny_llama(), kvplug.parse(spec), chunk, salt, **more)


@given(st.lists(st.integers(0, 1 << 40), max_size=40), st.integers(1, 9), st.data())
def test_a_chain_names_every_prefix(ids, chunk, data):
    found = keys.chain(ROOT, ids, chunk)
    assert len(found) == len(ids) // chunk
    assert all(len(key) == 32 and key[: keys.TAG] == ROOT[: keys.TAG] for key in found)
    assert found == keys.chain(ROOT, torch.tensor(ids, dtype=torch.int64), chunk)
    assert found[:2] == keys.chain(ROOT, ids[: 3 * chunk - 1], chunk)[:2]
    if found:  # a change of one token changes the key of its chunk and of all behind it
        at = data.draw(st.integers(0, len(found) * chunk - 1))
        other = keys.chain(ROOT, [*ids[:at], ids[at] + 1, *ids[at + 1 :]], chunk)
        assert other[: at // chunk] == found[: at // chunk]
        assert not set(other[at // chunk :]) & set(found)


def test_the_same_in_two_processes_with_other_hash_seeds(monkeypatch):
    code = (
        "import json, kvplug\n"
        "from kvplug.store import keys\n"
        "from kvplug.testing.tools import tiny_llama\n"
        "model = tiny_llama(name_or_path='elsewhere/' + str(hash('x')))\n"
        "root = keys.root(model, kvplug.parse('int4+host+reference'), 64, 'salt')\n"
        "print(json.dumps([k.hex() for k in keys.chain(root, range(200), 64)]))\n"
    )
    found = []
    for seed in ("1", "2"):
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        found.append(json.loads(fresh(code).stdout))
    here = keys.chain(root(salt="salt"), range(200), 64)
    assert found == [[key.hex() for key in here]] * 2


def test_what_a_root_names():
    model = tiny_llama()
    plain = root(model)
    assert root(model, "int4+host+numba") == root(model, "disk+int4") == plain  # place and kernel
    others = {
        "spec": root(model, "int8"),
        "option": root(model, "int4(tail=0)"),
        "layer": root(model, "int4+int8@0"),
        "chunk": root(model, chunk=32),
        "salt": root(model, salt="x"),
        "named": root(model, model_id="a model"),
        "other name": root(model, model_id="another"),
        "config": root(tiny_llama(rope_theta=7.0)),
        "eager": root(tiny_llama(attn_implementation="eager")),
        "bfloat16": root(tiny_llama().bfloat16()),
    }
    with torch.autocast("cpu", torch.bfloat16):
        others["autocast"] = root(model)
    assert len({plain, *others.values()}) == len(others) + 1
    assert root(model, "int4+int8@-1") == root(model, "int4+int8@1")
    assert root(tiny_llama(name_or_path="elsewhere")) == plain == root(model)


@pytest.mark.parametrize("verify", weights.VERIFY)
def test_other_weights_are_another_root(verify):
    model = tiny_llama()
    found = [root(model, verify=verify)]
    with torch.no_grad():
        model.lm_head.weight[3, 5] += 1
        found.append(root(model, verify=verify))
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 2)
        found.append(root(model, verify=verify))
        model.model.layers[1].mlp.up_proj.weight.data.mul_(2)
        found.append(root(model, verify=verify))
    assert len(set(found)) == 4


def test_one_element_through_data_needs_full():
    model = tiny_llama()
    before, whole = root(model), root(model, verify="full")
    assert before == whole
    model.lm_head.weight.data[0, 1] += 1  # neither address nor count of writes change
    assert root(model) == before
    assert root(model, verify="full") != before
    assert root(model) == root(model, verify="full")  # which is known from now on


def test_tensors_are_digested_once(monkeypatch):
    seen, real = [], weights._sha256
    monkeypatch.setattr(weights, "_sha256", lambda x: seen.append(x.shape) or real(x))
    model = tiny_llama()
    for _ in range(3):
        root(model)
    assert len(seen) == len(dict(model.named_parameters())) + len(dict(model.named_buffers()))
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    root(model)
    assert seen[-1] == model.lm_head.weight.shape
    assert len(seen) == len(dict(weights._tensors(model))) + 1


def test_any_tensor_is_read():
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.complex = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))
            self.gaps = torch.nn.Parameter(torch.ones(4, 6)[:, ::2])
            self.register_buffer("none", torch.empty(0, 3))
            self.register_buffer("scalar", torch.tensor(True))
            self.register_buffer("small", torch.ones(2).to(torch.float8_e4m3fn))
            with torch.inference_mode():
                self.register_buffer("inference", torch.ones(40))

    odd = Odd()
    before = weights.digest(odd)
    assert weights.digest(Odd()) == before
    odd.gaps.data[0, 0] = 2
    assert weights.digest(odd) != before


def test_what_cannot_be_read_wants_a_name():
    model = tiny_llama().to("meta")
    with pytest.raises(kvplug.StoreError, match=r"LlamaForCausalLM cannot be read .*'model_id'"):
        root(model)
    assert root(model, model_id="a") == root(model, model_id="a") != root(model, model_id="b")
    with pytest.raises(kvplug.StoreError, match=r"'ful'\. Did you mean 'full'"):
        root(verify="ful")
    with pytest.raises(kvplug.StoreError, match="salt=7: a text"):
        root(salt=7)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_adapters():
    peft = pytest.importorskip("peft")
    model = tiny_llama()
    found = {"bare": root(model)}
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config, adapter_name="one")
    found["one"] = root(model)
    with wrapped.disable_adapter():
        found["disabled"] = root(model)
    assert root(model) == found["one"]
    wrapped.add_adapter("two", config)
    found["one beside two"] = root(model)
    wrapped.set_adapter("two")
    found["two"] = root(model)
    wrapped.merge_adapter()
    found["merged"] = root(model)
    assert len(set(found.values())) == len(found)
