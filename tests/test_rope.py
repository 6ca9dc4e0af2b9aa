"""Keys turned by d positions are the keys the model itself would have made d positions later."""

import importlib

import pytest
import torch
import transformers
from rotary import BASE

import kvplug
from kvplug.compat import cache_argument, output_cache
from kvplug.layers.rotation import turns
from kvplug.testing.architectures import ARCHITECTURES
from kvplug.testing.architectures import make as make_kind
from kvplug.testing.tools import prompt, random_model

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


def rotation_of(config):
    """Of the first layer's keys."""
    return turns(config, (0,))[0][0]


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
    rotation = rotation_of(config)
    ours = rotation.shift(at(20), torch.tensor([by, by]))
    # the model's own angles are float32: coarse at 1e5, where ours are not
    tolerance = 1e-5 if abs(by) < 1000 else 0.05
    torch.testing.assert_close(ours, at(20 + by), atol=tolerance, rtol=1e-5)
    assert int(start[0]) == 20
    if by:
        assert not torch.allclose(ours, at(20), atol=1e-2)


def test_rows_move_by_their_own_number():
    rotation = rotation_of(transformers.LlamaConfig(**BASE))
    keys = torch.randn(3, 2, 4, 16)
    moved = rotation.shift(keys, torch.tensor([0, 5, 9]))
    assert torch.equal(moved[0], keys[0])
    for row, by in ((1, 5), (2, 9)):
        alone = rotation.shift(keys[row : row + 1], torch.tensor([by]))
        torch.testing.assert_close(moved[row : row + 1], alone)
    back = rotation.shift(moved, torch.tensor([0, -5, -9]))
    torch.testing.assert_close(back, keys, atol=1e-5, rtol=1e-5)


def test_keys_keep_their_dtype_and_length():
    rotation = rotation_of(transformers.LlamaConfig(**BASE))
    keys = torch.randn(1, 2, 4, 16)
    turned = rotation.shift(keys.bfloat16(), torch.tensor([7]))
    assert turned.dtype == torch.bfloat16
    torch.testing.assert_close(rotation.shift(keys, torch.tensor([70])).norm(), keys.norm())


def test_models_without_rotation_have_none():
    for config in (transformers.GPT2Config(), transformers.BloomConfig(), transformers.T5Config()):
        assert turns(config, (0, 1)) == {0: (None, None), 1: (None, None)}


class Elsewhere(transformers.PreTrainedConfig):
    """As from a model's own repository."""

    model_type = "elsewhere"
    num_hidden_layers = 1


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
            lambda: transformers.HunYuanDenseV1Config(**BASE),
            "the keys of HunYuanDenseV1: layer 0 changes them after the turn",
        ),
        (lambda: transformers.GPTJConfig(), "that its rotary embedding does not show"),
        (
            lambda: Elsewhere(layer_types=["full_attention"]),
            "cannot tell how Elsewhere rotates its keys: no model class is known for this config",
        ),
    ],
)
def test_what_cannot_be_turned_is_refused_at_construction(config, text):
    with pytest.raises(kvplug.SpecError) as e:
        kvplug.build("sinks", config())
    assert text in str(e.value)
    assert kvplug.build("window", config()).held() == 0


# --- positions that are not columns


@pytest.fixture(scope="module")
def qwen2_vl():
    config = transformers.Qwen2VLConfig(
        text_config={
            "vocab_size": 99, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3],
            },
        },
        vision_config={
            "depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 64, "patch_size": 4,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
        },
        image_token_id=97, vision_start_token_id=98, vision_end_token_id=96, video_token_id=95,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen2VLForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


NEW = {"max_new_tokens": 20, "do_sample": False}


def test_images_that_move_positions_are_refused_before_the_model_runs(qwen2_vl):
    """M-RoPE: an image takes fewer positions than columns; sinks would stand in the future."""
    ids = torch.tensor([[5, 6, 98, *[97] * 16, 96, 7, 8]])
    inputs = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids),
        "image_grid_thw": torch.tensor([[1, 8, 8]]), "mm_token_type_ids": (ids == 97).int(),
        "pixel_values": torch.randn(64, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(0)),
    }  # fmt: skip
    spec = "sinks(sinks=2, window=8)"
    plain = qwen2_vl.generate(**inputs, **NEW)
    assert torch.equal(qwen2_vl.generate(**inputs, cache_implementation="growing", **NEW), plain)
    with pytest.raises(kvplug.SpecError, match="positions of this prompt are not its columns"):
        qwen2_vl.generate(**inputs, cache_implementation=spec, **NEW)
    cache = kvplug.build(spec, qwen2_vl.config.get_text_config())
    with pytest.raises(kvplug.SpecError, match="positions of this prompt are not its columns"):
        qwen2_vl.generate(**inputs, **cache_argument(cache), **NEW)
    with pytest.raises(kvplug.SpecError, match="behind an image, positions of Qwen2VLConfig"):
        kvplug.build(spec, qwen2_vl.config)  # a forward pass by hand says nothing of images
    assert kvplug.build("window", qwen2_vl.config).held() == 0


def test_text_alone_is_served_where_images_would_move_positions(qwen2_vl):
    ids, spec = prompt(13), "sinks(sinks=2, window=8)"
    ours = qwen2_vl.generate(ids, cache_implementation=spec, **NEW)
    cache = kvplug.build(spec, qwen2_vl.config.get_text_config())
    with torch.no_grad():
        row = ids
        for _ in range(20):
            logits = qwen2_vl(
                row[:, cache.get_seq_length() :],
                position_ids=torch.arange(cache.get_seq_length(), row.shape[1]).expand(3, 1, -1),
                **cache_argument(cache),
            ).logits
            row = torch.cat((row, logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(ours, row)


def test_positions_that_do_not_follow_columns_are_refused():
    model = random_model(transformers.LlamaConfig(**BASE))
    spec, ids = "sinks(sinks=2, window=8)", prompt(12)
    holes = torch.ones_like(ids)
    holes[:, 4:6] = 0
    with pytest.raises(kvplug.SpecError, match="a mask with holes"):
        model.generate(ids, attention_mask=holes, cache_implementation=spec, **NEW)
    right = torch.ones_like(ids)
    right[:, :3] = 0
    for mask in (right, right.flip(1), None):
        model.generate(ids, attention_mask=mask, cache_implementation=spec, **NEW)
    gpt2 = random_model(transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=97))
    gpt2.generate(ids, attention_mask=holes, cache_implementation=spec, **NEW)  # nothing is turned


# --- learning from a config


@pytest.mark.parametrize(
    "name", ["Qwen3_5Text", "Qwen2_5_VLText", "Gemma4Text", "Gemma3Text", "Emu3Text", "Cohere2"]
)
def test_models_of_real_size_are_learned_from_without_their_weights(name):
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip(f"this transformers has no {name}")
    state = torch.random.get_rng_state()
    config = getattr(transformers, f"{name}Config")()
    pinned = [x.sinks for x in kvplug.build("sinks", config).layers if getattr(x, "sinks", None)]
    assert pinned
    for kept in pinned:
        assert (kept.turn[0] is None) == (name == "Cohere2")  # full attention without positions
        assert kept.turn[1] is None
    assert torch.equal(torch.random.get_rng_state(), state)
    shared = {id(kept.turn[0]) for kept in pinned}
    assert len(shared) == 1  # angles of a step are computed once
    again = kvplug.build("sinks", config).layers
    others = {id(x.sinks.turn[0]) for x in again if getattr(x, "sinks", None)}
    assert name == "Cohere2" or not shared & others  # but not shared between caches


def test_sliding_and_full_layers_have_their_own_frequencies():
    config = transformers.Gemma3TextConfig(
        **BASE, layer_types=["sliding_attention", "full_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e2},
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        },
    )  # fmt: skip
    learned = turns(config, (0, 1))
    for i, step in ((0, 1e2 ** (-2 / 16)), (1, 1e6 ** (-2 / 16) / 8)):
        assert float(learned[i][0].inv_freq[1]) == pytest.approx(step)


def test_callers_defaults_do_not_matter():
    config = transformers.LlamaConfig(
        **BASE, rope_parameters={"rope_type": "default", "rope_theta": 77.0}
    )
    with torch.device("meta"), torch.inference_mode():
        learned = turns(config, (0,))[0][0]
    assert float(learned.inv_freq[1]) == pytest.approx(77.0 ** (-2 / 16))


@pytest.mark.parametrize(
    ("name", "turned"), [("whisper", False), ("moonshine", True), ("t5gemma, sliding", True)]
)
def test_decoders_are_learned_from_with_the_encoders_they_read(name, turned):
    """Moonshine and T5Gemma turn keys, Whisper adds positions before."""
    config = make_kind(name).config
    layers = kvplug.build("sinks", config).layers
    sinks = [layer.sinks for layer in layers if getattr(layer, "sinks", None)]
    assert sinks
    for sink in sinks:
        assert (sink.turn[0] is not None) == turned
        assert sink.turn[1] is None


# transformers' own, in the vision part of 5.17
@pytest.mark.filterwarnings("ignore:`hidden_state` is deprecated:FutureWarning")
def test_columns_of_images_are_neither_pinned_nor_dropped():
    """A window shorter than what Mllama's cross-attention looks at."""
    architecture = ARCHITECTURES["mllama, cross-attention"]
    model = make_kind("mllama, cross-attention")
    inputs = architecture.media(prompt(13, 2))
    options = {"do_sample": False, "max_new_tokens": 8, "return_dict_in_generate": True}
    columns = output_cache(model.generate(**inputs, **options)).layers[1].keys.shape[2]
    for spec in ("window(length=3)", "sinks(sinks=1, window=3)+int8(block=8)", "static"):
        out = model.generate(**inputs, **options, cache_implementation=f"kvplug:{spec}")
        assert output_cache(out).layers[1].keys.shape[2] == columns > 3
