"""A decoder that reads an encoder: its self-attention is ours, cross-attention transformers'."""

import pytest
import torch
import transformers
from greedy import GREEDY
from transformers import DynamicCache

import kvplug
from kvplug.compat import cache_argument, output_cache
from kvplug.testing.pairs import pairwise
from kvplug.testing.tools import left_padded, normal, prompt

pytestmark = pytest.mark.canary


def encoder_decoder(kind):
    """A tiny model that reads an encoder, and two inputs of it, the second one left-padded."""
    settings = {
        "vocab_size": 97, "d_model": 32, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": None, "decoder_start_token_id": 1,
    }  # fmt: skip
    inputs = left_padded([prompt(n, seed=n)[0] for n in (19, 6)])
    if kind == "t5":
        settings |= {
            "d_kv": 8,
            "d_ff": 32,
            "num_layers": 2,
            "num_heads": 4,
            "initializer_factor": 3.0,
        }
        config, model = transformers.T5Config, transformers.T5ForConditionalGeneration
    else:
        settings |= {
            "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2, "init_std": 0.3,
            "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
        }  # fmt: skip
        config, model = transformers.BartConfig, transformers.BartForConditionalGeneration
    if kind == "whisper":
        settings |= {
            "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 64,
            "suppress_tokens": None, "begin_suppress_tokens": None,
        }  # fmt: skip
        config, model = transformers.WhisperConfig, transformers.WhisperForConditionalGeneration
        inputs = {"input_features": normal(2, 8, 40, seed=0)}
    torch.manual_seed(0)
    model = model(config(**settings)).eval()
    model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None
    return model, inputs


def generate(model, inputs, spec=None, **kwargs):
    """transformers' own: that of Whisper is another thing."""
    return transformers.GenerationMixin.generate(
        model,
        **inputs,
        cache_implementation=spec and f"kvplug:{spec}",
        return_dict_in_generate=True,
        **(GREEDY | kwargs),
    )


WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "assistant": {"assistant_model": True},
}
LOSSLESS = ["growing", "static", "exact(block=8)+host"]
PAIRS = pairwise(
    {"kind": ["t5", "bart", "whisper"], "way": [*WAYS], "spec": LOSSLESS},
    lambda row: (row.get("kind"), row.get("way")) != ("whisper", "assistant"),
)


@pytest.mark.parametrize("row", PAIRS, ids=lambda row: ", ".join(row.values()))
def test_a_decoder_with_an_encoder(row):
    """Its self-attention is ours, in every way to generate; cross-attention is transformers'."""
    kind, way, spec = row.values()
    model, inputs = encoder_decoder(kind)
    kwargs = dict(WAYS[way])
    if way in ("prompt lookup", "assistant"):  # of one row alone
        inputs = {name: x[:1] for name, x in inputs.items()}
    if way == "assistant":
        kwargs = {"assistant_model": encoder_decoder(kind)[0]}
    ours = generate(model, inputs, spec, **kwargs)
    assert torch.equal(ours.sequences, generate(model, inputs, **kwargs).sequences)
    check_pair(output_cache(ours), inputs, GREEDY["max_new_tokens"])


def check_pair(pair, inputs, decoded):
    """Self-attention is ours and has seen what was decoded; cross-attention was filled once."""
    ours, crossed = pair.self_attention_cache, pair.cross_attention_cache
    assert isinstance(ours, kvplug.Cache)
    assert type(crossed) is DynamicCache
    assert int(ours.get_seq_length()) == decoded
    # Whisper halves its frames
    assert crossed.get_seq_length() == (19 if "input_ids" in inputs else 20)


def test_a_pair_of_caches_handed_in_rolls_back():
    model, inputs = encoder_decoder("bart")
    first, lookup = {name: x[:1] for name, x in inputs.items()}, {"prompt_lookup_num_tokens": 3}
    ours = kvplug.build("growing", model.config)
    pair = transformers.EncoderDecoderCache(ours, transformers.DynamicCache(config=model.config))
    out = generate(model, first, **lookup, **cache_argument(pair))
    assert output_cache(out).self_attention_cache is ours
    assert torch.equal(out.sequences, generate(model, first, **lookup).sequences)


def test_padding_of_an_encoder_is_not_the_decoders():
    """`generate` gives what a loop gives that tells a cache of no padding: the decoder has none."""
    model, inputs = encoder_decoder("bart")
    spec, ids = "sinks(sinks=2, window=6)", torch.ones(2, 1, dtype=torch.long)
    pair = transformers.EncoderDecoderCache(
        kvplug.build(spec, model.config), transformers.DynamicCache(config=model.config)
    )
    with torch.no_grad():
        read = model.get_encoder()(**inputs)
        for _ in range(GREEDY["max_new_tokens"]):
            logits = model(
                encoder_outputs=read,
                attention_mask=inputs["attention_mask"],
                decoder_input_ids=ids[:, -1:],
                **cache_argument(pair),
            ).logits
            ids = torch.cat((ids, logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(generate(model, inputs, spec).sequences, ids)


@pytest.mark.parametrize("spec", ["sinks", "window"])
def test_relative_positions_that_count_from_the_first_key_have_no_window(spec):
    model, inputs = encoder_decoder("t5")
    with pytest.raises(kvplug.SpecError, match=r"position bias of T5Config counts keys.*use full"):
        generate(model, inputs, spec)


@pytest.mark.parametrize("spec", ["int8(block=8)", "static+int8(block=8)"])
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_what_is_encoded_with_loss_serves_a_decoder_too(kind, spec):
    model, inputs = encoder_decoder(kind)
    for kwargs in ({}, {"num_beams": 3}):
        ours = generate(model, inputs, spec, max_new_tokens=20, **kwargs)
        assert ours.sequences.shape == (2, 1 + 20)
        check_pair(output_cache(ours), inputs, 20)
        assert output_cache(ours).self_attention_cache.stats()["blocks_encoded"]
