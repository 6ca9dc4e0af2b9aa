"""The only file that changes transformers: strategies as `cache_implementation` of `generate`.

Two methods are wrapped. `GenerationConfig.validate` accepts our names;
`GenerationMixin._prepare_cache_for_generation` lets transformers prepare its own cache and puts
ours in the place of the decoder's. Calls that name no strategy of ours go through unchanged.
"""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any

from transformers import EncoderDecoderCache, GenerationConfig, GenerationMixin

from . import compat
from .cache import Cache, build, is_ours
from .errors import SpecError, UnknownStage
from .layout.growing import Growing
from .spec import parse

_originals: dict[str, Any] = {}


def register() -> None:
    """Make strategies known to `generate`, as `import kvplug` does; again changes nothing."""
    if _originals:
        return
    _originals["validate"] = GenerationConfig.validate
    _originals["prepare"] = GenerationMixin._prepare_cache_for_generation
    GenerationConfig.validate = _validate(_originals["validate"])
    GenerationMixin._prepare_cache_for_generation = _prepare(_originals["prepare"])


def unregister() -> None:
    """Put back what `register` replaced: transformers is as if kvplug had not been imported."""
    if _originals:
        GenerationConfig.validate = _originals.pop("validate")
        GenerationMixin._prepare_cache_for_generation = _originals.pop("prepare")


def _validate(original: Any) -> Any:
    @functools.wraps(original)
    def validate(self: GenerationConfig, *args: Any, **kwargs: Any) -> None:
        if not is_ours(self.cache_implementation):
            return original(self, *args, **kwargs)
        try:
            strategy = parse(self.cache_implementation, self.cache_config)
        except UnknownStage as e:
            theirs = ", ".join(compat.THEIR_NAMES)
            raise UnknownStage(f"{e} Names of transformers: {theirs}.") from None
        # transformers judges the rest, on a copy: the caller's object may be shared between threads
        return original(_without_ours(self, strategy.layout.name == "static"), *args, **kwargs)

    return validate


def _prepare(original: Any) -> Any:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def _prepare_cache_for_generation(self: GenerationMixin, *args: Any, **kwargs: Any) -> Any:
        call = signature.bind(self, *args, **kwargs)
        generation_config: GenerationConfig = call.arguments["generation_config"]
        model_kwargs: dict = call.arguments["model_kwargs"]
        max_cache_length: int = call.arguments["max_cache_length"]

        def prepare(config: GenerationConfig) -> Any:
            call.arguments["generation_config"] = config
            return original(*call.args, **call.kwargs)

        given = _cache_in(model_kwargs)
        ours = is_ours(generation_config.cache_implementation)
        if not ours or given is not None or generation_config.use_cache is False:
            if isinstance(given, Cache):
                given.set_padding(model_kwargs.get("attention_mask"))
            if ours and generation_config.is_assistant:
                # an assistant's later rounds bring the cache of the first, and the target's config
                generation_config = _without_ours(generation_config, static=False)
            return prepare(generation_config)
        name = generation_config.cache_implementation
        if not self._supports_default_dynamic_cache():
            raise SpecError(
                f"{type(self).__name__} builds its own kind of cache: "
                f"cache_implementation={name!r} cannot apply"
            )
        strategy = parse(name, generation_config.cache_config)
        if generation_config.is_assistant:
            # one round of an assistant does not know how long the sequence will be
            strategy = strategy.replace(layout=Growing())
        # prompt lookup guesses beyond the last token
        reserve = max_cache_length + (generation_config.prompt_lookup_num_tokens or 0)
        cache = build(
            strategy,
            self.config.get_text_config(decoder=True),
            max_cache_len=max(reserve, generation_config.max_cache_len or 0),
        )
        cache.set_padding(model_kwargs.get("attention_mask"))
        result = prepare(_without_ours(generation_config, static=False))
        theirs = _cache_in(model_kwargs)
        if theirs is None:
            raise SpecError(
                f"transformers prepared no cache for {type(self).__name__}: "
                f"{name!r} cannot take its place"
            )
        if isinstance(theirs, EncoderDecoderCache):
            theirs.self_attention_cache = cache  # cross-attention is filled once and stays
        else:
            slot = next(key for key, value in model_kwargs.items() if value is theirs)
            model_kwargs[slot] = cache
        if generation_config.is_assistant:
            cache.activate_past_recording()
        return result

    return _prepare_cache_for_generation


def _cache_in(model_kwargs: dict) -> Any:
    """The cache among a model's arguments, whatever its name, None without one."""
    given = (model_kwargs.get(key) for key in compat.CACHE_ARGUMENTS)
    return next((x for x in given if x is not None), None)


def _without_ours(config: GenerationConfig, static: bool) -> GenerationConfig:
    """A shallow copy that names a cache of transformers instead."""
    plain = copy.copy(config)
    plain.cache_implementation = "static" if static else None
    plain.cache_config = None
    return plain
