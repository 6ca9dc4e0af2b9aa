"""Tiny random models of many kinds: equal tokens where nothing is lost, layers as promised."""

from importlib import import_module

import pytest
import torch
import transformers
from transformers.cache_utils import DynamicLayer

import kvplug
from kvplug.compat import cache_argument, output_cache
from kvplug.layer import Layer
from kvplug.static import StaticCodedLayer
from kvplug.static import StaticLayer as OurStaticLayer
from kvplug.testing.tools import left_padded, prompt, random_model

BASE = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
HEAD = BASE | {"head_dim": 16}
NO_KV = {k: v for k, v in BASE.items() if k != "num_key_value_heads"}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}

CONFIGS = {
    "llama": ("Llama", HEAD),
    "mistral, sliding": ("Mistral", HEAD | {"sliding_window": 8}),
    "qwen2, key bias": ("Qwen2", BASE),
    "qwen3": ("Qwen3", HEAD),
    "gemma2, sliding and softcap": (
        "Gemma2",
        HEAD | {"sliding_window": 8, "query_pre_attn_scalar": 16, "attn_implementation": "eager"},
    ),
    "gemma3, sliding": (
        "Gemma3Text",
        HEAD
        | {
            "sliding_window": 8,
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "gpt2": (
        "GPT2",
        {
            "vocab_size": 97, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256,
            "initializer_range": 0.2, "eos_token_id": None, "bos_token_id": 1,
        },
    ),
    "gpt_neox, partial rotary": ("GPTNeoX", NO_KV | {"rotary_pct": 0.25}),
    "cohere, interleaved": ("Cohere", BASE),
    "phi": ("Phi", BASE),
    "falcon, multi-query": (
        "Falcon",
        {k: v for k, v in NO_KV.items() if k not in ("intermediate_size",)} | {"multi_query": True},
    ),
    "falcon, alibi": (
        "Falcon",
        {k: v for k, v in NO_KV.items() if k not in ("intermediate_size",)}
        | {"multi_query": False, "alibi": True},
    ),
    "mixtral": ("Mixtral", HEAD | MOE),
    "gpt_oss": ("GptOss", HEAD | MOE | {"sliding_window": 8}),
    "deepseek_v3, K wider than V": (
        "DeepseekV3",
        BASE
        | {
            "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16, "v_head_dim": 16, "first_k_dense_replace": 2,
        },
    ),
    "lfm2, conv hybrid": (
        "Lfm2",
        HEAD | {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    ),
    "qwen3_next, linear hybrid": (
        "Qwen3Next",
        HEAD
        | {
            "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
            "linear_value_head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
            "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
        },
    ),
    "bloom": (
        "Bloom",
        {
            "vocab_size": 97, "hidden_size": 64, "n_layer": 2, "n_head": 4,
            "initializer_range": 0.2, "eos_token_id": None, "pad_token_id": 0,
        },
    ),
    "mpt": (
        "Mpt",
        {
            "vocab_size": 97, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 256,
            "initializer_range": 0.2,
        },
    ),
    "opt": (
        "OPT",
        {k: v for k, v in NO_KV.items() if k not in ("intermediate_size", "initializer_range")}
        | {"ffn_dim": 64, "word_embed_proj_dim": 64, "init_std": 0.2},
    ),
    "olmo2": ("Olmo2", BASE),
    "granite": ("Granite", BASE),
    "stablelm": ("StableLm", BASE),
    "starcoder2": ("Starcoder2", BASE | {"sliding_window": None}),
    "smollm3": ("SmolLM3", BASE),
}  # fmt: skip

GREEDY = {"do_sample": False, "max_new_tokens": 24}
LOSSLESS = ["growing", "static", "exact(block=8)+host", "exact(block=8)+disk", "window(length=100)"]
LOSSY = ["int8(block=8)", "static+int8(block=8)", "int4(block=8, tail=8)+disk"]


def make(name):
    kind, settings = CONFIGS[name]
    settings = dict(settings)
    attention = settings.pop("attn_implementation", None)
    config = getattr(transformers, f"{kind}Config")(**settings)
    if attention:
        config._attn_implementation = attention
    model = random_model(config)
    if kind == "Qwen2":  # as trained ones have it: a constant that dwarfs the rest of its channel
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias.data[5] = 100.0
    return model


def skips_static(model, spec):
    """Where a compilable static layout has nothing to encode, or the model takes none."""
    if not spec.startswith("static"):
        return False
    theirs = transformers.StaticCache(config=model.config, max_cache_len=64)
    if "+" in spec and all(getattr(layer, "is_sliding", False) for layer in theirs.layers):
        with pytest.raises(kvplug.SpecError, match=r"could serve.*StaticSlidingWindowLayer"):
            kvplug.build(spec, model.config, max_cache_len=64)
        return True
    try:
        model(prompt(3), **cache_argument(theirs))
    except RuntimeError:  # alibi of Falcon: transformers' own static cache fails alike
        return True
    return False


def run(model, inputs, spec=None, **kwargs):
    if spec is not None:
        spec = f"kvplug:{spec}"
    return model.generate(**inputs, cache_implementation=spec, **(GREEDY | kwargs))


@pytest.fixture(params=CONFIGS)
def model(request):
    return make(request.param)


@pytest.mark.parametrize("batch", ["one", "padded"])
def test_lossless_strategies_give_the_tokens_of_dynamic_cache(model, batch):
    inputs = {"input_ids": prompt(13)}
    if batch == "padded":
        inputs = left_padded([prompt(n, seed=n)[0] for n in (19, 6)])
    plain = run(model, inputs)
    for spec in LOSSLESS:
        if skips_static(model, spec):
            continue
        assert torch.equal(run(model, inputs, spec), plain), spec


def test_lossy_strategies_are_near(model):
    """The first logits are exact, later ones near; nothing that is not finite."""
    ids = prompt(29)
    exact = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        steps = [
            model(x, **cache_argument(exact)).logits for x in (ids, *prompt(9, seed=1).split(1, 1))
        ]
        for spec in LOSSY:
            if skips_static(model, spec):
                continue
            cache = kvplug.build(spec, model.config, max_cache_len=64)
            for i, x in enumerate((ids, *prompt(9, seed=1).split(1, 1))):
                logits = model(x, **cache_argument(cache)).logits
                assert logits.isfinite().all()
                error = float((logits - steps[i]).abs().mean() / steps[i].abs().mean())
                assert error < (1e-4 if i == 0 else 0.6 if "int4" in spec else 0.05), (spec, i)


def test_layers_are_as_promised(model):
    theirs = transformers.DynamicCache(config=model.config).layers
    for spec in ("growing", "int8(block=8)", "sinks(sinks=2, window=20)+int8(block=8)"):
        ours = kvplug.build(spec, model.config).layers
        for a, b in zip(ours, theirs, strict=True):
            if type(b) is DynamicLayer:
                assert type(a) is Layer
                assert not a.is_sliding
                assert a.strategy == kvplug.parse(spec)
            elif getattr(b, "is_sliding", False):
                assert type(a) is Layer
                assert a.is_sliding
                assert a.strategy.retention.length == b.sliding_window
                assert a.strategy.codec == kvplug.parse(spec).codec
            else:
                assert type(a) is type(b)
    for spec, kind in (("static", OurStaticLayer), ("static+int8", StaticCodedLayer)):
        if skips_static(model, spec):
            continue
        ours = kvplug.build(spec, model.config, max_cache_len=32).layers
        for a, b in zip(ours, theirs, strict=True):
            assert (type(a) is kind) == (type(b) is DynamicLayer)


@pytest.mark.parametrize("name", ["mistral, sliding", "gemma3, sliding", "gpt_oss"])
@pytest.mark.parametrize("spec", ["growing", "exact(block=4)+host", "exact(block=4)+disk"])
def test_native_windows_stay_right_over_all_ways_to_generate(name, spec):
    model = make(name)
    inputs = {"input_ids": prompt(8).repeat(1, 3)}
    for kwargs in (
        {},
        {"num_beams": 3},
        {"prompt_lookup_num_tokens": 3},
        {"prefill_chunk_size": 5},
    ):
        assert torch.equal(run(model, inputs, spec, **kwargs), run(model, inputs, **kwargs)), kwargs


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(lambda: transformers.MambaConfig(num_hidden_layers=2), id="mamba"),
        pytest.param(
            lambda: transformers.Mamba2Config(
                num_hidden_layers=2, hidden_size=64, num_heads=8, head_dim=16
            ),
            id="mamba2",
        ),
    ],
)
def test_models_without_attention_are_refused_by_name(config):
    with pytest.raises(
        kvplug.SpecError, match=r"no attention layer it could serve.*LinearAttentionLayer"
    ):
        kvplug.build("int4", config())


def test_whisper():
    """Encoder-decoder with audio: self-attention ours, the same tokens."""
    config = transformers.WhisperConfig(
        vocab_size=97, d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=8,
        max_source_positions=20, max_target_positions=64, init_std=0.3, decoder_start_token_id=1,
        pad_token_id=0, bos_token_id=1, eos_token_id=None, suppress_tokens=None,
        begin_suppress_tokens=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.WhisperForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    features = torch.randn(1, 8, 40, generator=torch.Generator().manual_seed(0))
    plain = transformers.GenerationMixin.generate(model, features, **GREEDY)
    for spec in ("growing", "exact(block=8)+host"):
        ours = transformers.GenerationMixin.generate(
            model, features, cache_implementation=spec, return_dict_in_generate=True, **GREEDY
        )
        assert torch.equal(ours.sequences, plain)
        assert isinstance(output_cache(ours).self_attention_cache, kvplug.Cache)


def test_a_layer_of_an_unknown_kind_is_an_error(monkeypatch):
    """What a later transformers, or a model's own code, may bring beside the layers we know."""

    class NewLayer(DynamicLayer):
        pass

    known = transformers.DynamicCache.__init__

    def init(self, *args, **kwargs):
        known(self, *args, **kwargs)
        self.layers[1:2] = [NewLayer()]

    config = transformers.LlamaConfig(num_hidden_layers=3)
    monkeypatch.setattr(transformers.DynamicCache, "__init__", init)
    with pytest.raises(kvplug.SpecError, match=r"int8: LlamaConfig.*does not know: NewLayer"):
        kvplug.build("int8", config)


def test_a_real_layer_of_its_own_kind():
    """DeepSeek-V4 keeps compressed keys beside a window."""
    if not hasattr(transformers, "DeepseekV4Config"):
        pytest.skip("this transformers has no DeepSeek-V4")
    import_module("transformers.models.deepseek_v4.modeling_deepseek_v4")  # makes them known
    with pytest.raises(kvplug.SpecError, match=r"DeepseekV4Config.*does not know: DeepseekV4"):
        kvplug.build("int8", transformers.DeepseekV4Config(num_hidden_layers=4))
