"""Keys turned by d positions are the keys the model itself would have made d positions later."""

import importlib

import pytest
import torch
import transformers

import kvplug
from kvplug.rope import Rotation

BASE = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 512,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128,
}  # fmt: skip
NEOX = {k: v for k, v in BASE.items() if k not in ("num_key_value_heads", "head_dim")}

CONFIGS = {
    "llama": ("Llama", BASE),
    "llama3": ("Llama", BASE | {"rope_parameters": LLAMA3}),
    "yarn": ("Llama", BASE | {"rope_parameters": YARN}),
    "linear": (
        "Llama",
        BASE | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "interleaved": ("Cohere", BASE | {"pad_token_id": 0}),
    "partial": ("GPTNeoX", NEOX),
    "partial phi": ("Phi", {k: v for k, v in BASE.items() if k != "head_dim"}),
    "qwen3": ("Qwen3", BASE),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("by", [0, 1, 37, -5, 100_000])
def test_shift_is_the_models_own_rotation(name, by):
    kind, settings = CONFIGS[name]
    config = getattr(transformers, f"{kind}Config")(**settings)
    module = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
    embedding = getattr(module, f"{kind}RotaryEmbedding")(config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = torch.randn(2, 2, 5, head_dim, generator=torch.Generator().manual_seed(0))

    def at(position):
        positions = torch.arange(5)[None] + position
        cos, sin = embedding(keys, positions)
        r = cos.shape[-1]
        turned, _ = module.apply_rotary_pos_emb(keys[..., :r], keys[..., :r], cos, sin)
        return torch.cat((turned, keys[..., r:]), -1)

    start = torch.tensor([20, 20])
    rotation = Rotation.of(config)
    ours = rotation.shift(at(20), torch.tensor([by, by]))
    # the model's own angles are float32: coarse at 1e5, where ours are not
    tolerance = 1e-5 if abs(by) < 1000 else 0.05
    torch.testing.assert_close(ours, at(20 + by), atol=tolerance, rtol=1e-5)
    assert int(start[0]) == 20
    if by:
        assert not torch.allclose(ours, at(20), atol=1e-2)


def test_rows_move_by_their_own_number():
    rotation = Rotation.of(transformers.LlamaConfig(**BASE))
    keys = torch.randn(3, 2, 4, 16)
    moved = rotation.shift(keys, torch.tensor([0, 5, 9]))
    assert torch.equal(moved[0], keys[0])
    for row, by in ((1, 5), (2, 9)):
        alone = rotation.shift(keys[row : row + 1], torch.tensor([by]))
        torch.testing.assert_close(moved[row : row + 1], alone)
    back = rotation.shift(moved, torch.tensor([0, -5, -9]))
    torch.testing.assert_close(back, keys, atol=1e-5, rtol=1e-5)


def test_keys_keep_their_dtype_and_length():
    rotation = Rotation.of(transformers.LlamaConfig(**BASE))
    keys = torch.randn(1, 2, 4, 16)
    turned = rotation.shift(keys.bfloat16(), torch.tensor([7]))
    assert turned.dtype == torch.bfloat16
    torch.testing.assert_close(rotation.shift(keys, torch.tensor([70])).norm(), keys.norm())


def test_models_without_rotation_have_none():
    assert Rotation.of(transformers.GPT2Config()) is None
    assert Rotation.of(transformers.BloomConfig()) is None


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (
            lambda: transformers.LlamaConfig(
                **BASE,
                rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
            ),
            "frequencies of rope_type 'dynamic' change with length; accepted: default, linear,",
        ),
        (
            lambda: transformers.DeepseekV3Config(num_hidden_layers=2),
            "only a part of each head is rotated",
        ),
    ],
)
def test_what_cannot_be_turned_is_refused_at_construction(config, text):
    with pytest.raises(kvplug.SpecError) as e:
        kvplug.build("sinks", config())
    assert text in str(e.value)
    assert kvplug.build("window", config()).held() == 0
