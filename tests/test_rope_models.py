"""Every model's own keys are the oracle of how its layers are turned, and its logits."""

import pytest
import torch
import transformers
from rotary import BASE

import kvplug
from kvplug.compat import cache_argument
from kvplug.layers.growing import Layer
from kvplug.testing.tools import prompt, random_model

TINY = BASE | {
    "num_hidden_layers": 4, "max_position_embeddings": 256, "initializer_range": 0.2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "n_shared_experts": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "decoder_layers": 4,
    "decoder_attention_heads": 4, "decoder_ffn_dim": 64, "encoder_layers": 1,
    "encoder_attention_heads": 4, "encoder_ffn_dim": 64, "d_model": 64, "ffn_dim": 64,
    "word_embed_proj_dim": 64, "rotary_dim": 8, "n_input_layers": 1, "n_output_layers": 1,
}  # fmt: skip
LATENT = ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
VARIANTS = [
    TINY,
    {k: v for k, v in TINY.items() if k != "head_dim"} | {"num_key_value_heads": 4},
    {k: v for k, v in TINY.items() if k not in ("head_dim", *LATENT)},
    TINY | {"num_key_value_heads": 4},
    {k: v for k, v in TINY.items() if k not in ("head_dim", "num_key_value_heads")},
]


class Keeping(transformers.DynamicCache):
    """Remembers what layers wrote."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        self.__dict__.setdefault("written", {})[layer_idx] = key_states, value_states
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def written(model, ids, start):
    """By layer, keys and values of ids [1, T] as they stand from position `start` on."""
    cache = Keeping(config=model.config)
    positions = torch.arange(start, start + ids.shape[1])[None]
    with torch.no_grad():
        model(input_ids=ids, position_ids=positions, **cache_argument(cache))
    return cache.written


def tiny(config_class):
    """A small model with random norms, which says nothing of positions but by rotation.

    And what it writes at position 0. None where this is no text model, no layer of it is served, or
    no settings of ours build it.
    """
    for settings in VARIANTS:
        try:
            config = config_class(**settings)
            if config.get_text_config() is not config:
                break
            with torch.device("meta"):
                model = transformers.AutoModelForCausalLM.from_config(config)
            kvplug.build("window", config)  # else no layer would be pinned
            if sum(x.numel() for x in model.parameters()) > 3e6:
                continue
            model = random_model(config)
            for weight in model.parameters():
                if weight.dim() == 1:
                    weight.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(0))
            for module in model.modules():  # absolute positions: all the same
                kind = type(module).__name__
                if "Embedding" in kind and module is not model.get_input_embeddings():
                    tables = [*module._parameters.values()]
                    tables += module._buffers.values() if "Positional" in kind else ()
                    for table in tables:
                        if table is not None and table.dim() == 2:
                            table.data[:] = table.data[:1].clone()
            return model, written(model, torch.tensor([[5]]), 0)
        except Exception:  # a setting that this model does not take
            continue
    return None, None


# of those that build, and why
REFUSED = {
    "CodeGen": "does not show",  # a table of sines
    "GPTJ": "does not show",
    "HunYuanDenseV1": "changes them after the turn",  # a norm
    "HunYuanMoEV1": "changes them after the turn",
    "LongcatFlash": "cannot tell how",  # two caches per block
    "Zaya": "changes them after the turn",  # a convolution over keys
}


@pytest.mark.filterwarnings("ignore")
def test_every_layer_of_every_model_turns_as_we_turn_it():
    """One token at positions 0 and 37, norms random: the models' own keys are the oracle."""
    by, right, wrong, refused = 37, [], {}, {}
    for config_class in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        name = config_class.__name__.removesuffix("Config")
        model, here = tiny(config_class)
        if model is None:
            continue
        try:
            layers = kvplug.build("sinks(sinks=2, window=8)", model.config).layers
        except kvplug.SpecError as e:
            refused[name] = str(e)
            continue
        there = written(model, torch.tensor([[5]]), by)
        pinned = {i: x.sinks for i, x in enumerate(layers) if isinstance(x, Layer) and x.sinks}
        for i, sinks in pinned.items():
            for a, b, rotation in zip(here[i], there[i], sinks.turn, strict=True):
                ours = a if rotation is None else rotation.shift(a, torch.tensor([by]))
                error = float((ours - b).abs().max() / b.abs().max())
                if error > 1e-4:
                    wrong[f"{name}, layer {i}"] = error
        right += [name] if pinned else []
    assert not wrong
    assert {k: v for k, v in refused.items() if REFUSED.get(k, "not refused") not in v} == {}
    assert len(right) > 70, right
    assert {"Llama", "SmolLM3", "Cohere2", "Exaone4", "GptOss", "DeepseekV3"} <= {*right}


# --- tokens

LATENT_SIZES = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16, "v_head_dim": 16, "first_k_dense_replace": 4,
}  # fmt: skip
WIDE = BASE | {"num_hidden_layers": 4, "initializer_range": 0.2, "pad_token_id": 0}
HEADLESS = {k: v for k, v in WIDE.items() if k != "head_dim"}
FULL = WIDE | {"layer_types": ["full_attention"] * 4}
MODELS = {
    "smollm3, layers without positions": ("SmolLM3", HEADLESS),
    "deepseek_v3, latents": ("DeepseekV3", HEADLESS | LATENT_SIZES),
    "gpt_oss, yarn": ("GptOss", FULL | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "nanochat, turned the other way": ("NanoChat", WIDE),
    "cohere, interleaved": ("Cohere", WIDE),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_sinks_that_the_model_wrote_where_they_stand(name):
    """The oracle holds dense keys, and has the model itself write the sinks anew at each step.

    Hidden states of the first tokens do not change when all of them move.
    """
    kind, settings = MODELS[name]
    if not hasattr(transformers, f"{kind}Config"):
        pytest.skip(f"this transformers has no {kind}")
    model = random_model(getattr(transformers, f"{kind}Config")(**settings))
    for weight in model.parameters():
        if weight.dim() == 1:
            weight.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(0))
    sinks, window, ids = 2, 8, prompt(40)
    ours = kvplug.build(f"sinks(sinks={sinks}, window={window})", model.config)
    plain = Keeping(config=model.config)
    with torch.no_grad():
        start = model(ids[:, :9], **cache_argument(plain)).logits
        torch.testing.assert_close(model(ids[:, :9], **cache_argument(ours)).logits, start)
    own = dict(plain.written)  # by layer, keys and values of all tokens where they first stood
    for seen in range(9, ids.shape[1]):
        first = max(0, seen - (window - 1) - sinks)
        moved = written(model, ids[:, :sinks], first)
        cache = Keeping(config=model.config)
        for i, layer in enumerate(cache.layers):
            parts = zip(moved[i], own[i], strict=True)
            layer.update(
                *(torch.cat((sink, x[:, :, first + sinks :]), 2) for sink, x in parts)
                if first
                else own[i]
            )
        ids_now, position = ids[:, seen : seen + 1], torch.tensor([[seen]])
        with torch.no_grad():
            expected = model(ids_now, position_ids=position, **cache_argument(cache)).logits
            got = model(ids_now, position_ids=position, **cache_argument(ours)).logits
        torch.testing.assert_close(got, expected, atol=2e-4, rtol=2e-4)
        own = {
            i: tuple(torch.cat(x, 2) for x in zip(own[i], cache.written[i], strict=True))
            for i in own
        }
