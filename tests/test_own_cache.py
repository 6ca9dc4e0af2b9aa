"""Models that prepare a cache of their own: an error where ours would not be used."""

import pytest
import torch
import transformers
from greedy import GREEDY
from transformers import DynamicCache

import kvplug
from kvplug.compat import cache_argument, output_cache
from kvplug.testing.tools import prompt, random_model

pytestmark = pytest.mark.canary


def test_models_that_build_their_own_cache_say_so():
    config = transformers.MambaConfig(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=4,
        pad_token_id=0,
        eos_token_id=None,
    )
    model = random_model(config)
    with pytest.raises(kvplug.SpecError, match=r"int4.*Mamba|Mamba.*int4|no attention layer"):
        model.generate(prompt(5), cache_implementation="int4", **GREEDY)
    assert model.generate(prompt(5), **GREEDY).shape == (1, 17)


class OwnCache(transformers.LlamaForCausalLM):
    """Prepares its cache itself, as Parakeet's and VibeVoice's classes do."""

    def _prepare_cache_for_generation(self, config, kwargs, *_):
        if config.use_cache is not False:
            kwargs.update(cache_argument(DynamicCache(config=self.config)))


class CallsOn(transformers.LlamaForCausalLM):
    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)


class Inherits(OwnCache):
    """Overridden twice: what counts is where it ends."""

    def _prepare_cache_for_generation(self, *args, **kwargs):
        super()._prepare_cache_for_generation(*args, **kwargs)


@pytest.mark.parametrize("kind", [OwnCache, Inherits])
def test_a_model_that_does_not_take_our_cache_is_an_error(kind, model, ids, monkeypatch):
    theirs = kind(model.config).eval()
    theirs.load_state_dict(model.state_dict())
    plain = model.generate(ids, **GREEDY)
    before = vars(kind)["_prepare_cache_for_generation"]
    assert torch.equal(theirs.generate(ids, **GREEDY), plain)
    assert vars(kind)["_prepare_cache_for_generation"] is before, "watched only when it matters"
    with monkeypatch.context() as patch:
        patch.setattr(theirs, "forward", lambda *_, **__: pytest.fail("the model ran"))
        for _ in range(2):
            with pytest.raises(kvplug.SpecError, match=rf"{kind.__name__}.*own kind.*'int4'"):
                theirs.generate(ids, cache_implementation="int4", **GREEDY)
    assert torch.equal(theirs.generate(ids, **GREEDY), plain)
    kvplug.unregister()
    try:
        assert vars(kind)["_prepare_cache_for_generation"] is before
    finally:
        kvplug.register()


def test_a_model_that_prepares_more_and_calls_on(model, ids):
    theirs = CallsOn(model.config).eval()
    theirs.load_state_dict(model.state_dict())
    for _ in range(2):
        out = theirs.generate(
            ids, cache_implementation="growing", return_dict_in_generate=True, **GREEDY
        )
        assert isinstance(output_cache(out), kvplug.Cache)
        assert torch.equal(out.sequences, model.generate(ids, **GREEDY))


def test_a_real_model_with_a_cache_of_its_own_kind():
    """Parakeet's transducer: transformers encodes the audio first, no token is decoded."""
    config = transformers.ParakeetRNNTConfig(
        vocab_size=33,
        blank_token_id=32,
        decoder_hidden_size=16,
        encoder_config={
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "subsampling_conv_channels": 8,
            "num_mel_bins": 16,
        },
    )
    model = transformers.ParakeetForRNNT(config).eval()
    model.generation_config.decoder_start_token_id = 32
    with pytest.raises(kvplug.SpecError, match=r"ParakeetForRNNT.*own kind.*'int4'"):
        model.generate(
            input_features=torch.randn(1, 64, 16), cache_implementation="int4", max_new_tokens=4
        )
