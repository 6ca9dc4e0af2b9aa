"""The only file that changes transformers: strategies as `cache_implementation` of `generate`.

Five methods are wrapped. `GenerationConfig.validate` accepts our names;
`GenerationMixin._prepare_cache_for_generation` lets transformers prepare its own cache and puts
ours in the place of the decoder's; `_prepare_generation_config`, the first that knows model and
name, sees to it that a model which prepares its cache by code of its own is watched; `_prefill`,
the first that has the ids as the cache will see them, fills a cache from its store;
`_assisted_decoding` is followed by the end of past recording, which transformers leaves on in the
cache it hands back. Calls that name no strategy of ours go through unchanged.

The assistant of assisted decoding caches by the name that transformers gives it: up to 5.23 the
target's, from 5.24 on what its own `generation_config.cache_implementation` says.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
from types import SimpleNamespace
from typing import Any

from transformers import GenerationConfig, GenerationMixin

from . import bias, compat
from .cache import Cache
from .choose import choose
from .errors import KvplugError, SpecError, UnknownHost, UnknownStage
from .factory import build
from .pair import Pair
from .prefix import fall_back, fill, told
from .spec import is_ours, parse
from .strategy import Auto, Strategy

logger = logging.getLogger("kvplug")

_originals: dict[tuple[type, str], Any] = {}


def register() -> None:
    """Make strategies known to `generate`, as `import kvplug` does; again changes nothing.

    On a transformers that lacks what this needs, naming a strategy raises UnknownHost instead.
    """
    if _originals:
        return
    missing = compat.problems()
    if missing:
        _wrap(GenerationConfig, compat.VALIDATE, functools.partial(_refuse_config, missing))
        _wrap(GenerationMixin, "generate", functools.partial(_refuse_call, missing))
        return
    _wrap(GenerationConfig, compat.VALIDATE, _validate)
    _wrap(GenerationMixin, compat.PREPARE_CONFIG, _prepare_config)
    _wrap(GenerationMixin, compat.PREPARE_CACHE, _prepare)
    _wrap(GenerationMixin, compat.PREFILL, _prefilled)
    _wrap(GenerationMixin, compat.ASSISTED, _assisted)


def unregister() -> None:
    """Put back what `register` replaced: transformers is as if kvplug had not been imported."""
    while _originals:
        (owner, name), original = _originals.popitem()
        if original is None:
            delattr(owner, name)
        else:
            setattr(owner, name, original)


def _wrap(owner: type, name: str, wrapper: Any) -> None:
    """Replace a method that is there, once."""
    method = getattr(owner, name, None)
    if method is not None and (owner, name) not in _originals:
        _originals[owner, name] = vars(owner).get(name)  # None where a base class has it
        setattr(owner, name, wrapper(method))


def _refuse_config(missing: list[str], original: Any) -> Any:
    @functools.wraps(original)
    def validate(self: GenerationConfig, *args: Any, **kwargs: Any) -> None:
        _refuse(self, missing)
        return original(self, *args, **kwargs)

    return validate


def _refuse_call(missing: list[str], original: Any) -> Any:
    @functools.wraps(original)
    def generate(self: GenerationMixin, *args: Any, **kwargs: Any) -> Any:
        named = SimpleNamespace(**kwargs)
        for config in (named, *args, *kwargs.values(), getattr(self, "generation_config", None)):
            _refuse(config, missing)
        return original(self, *args, **kwargs)

    return generate


def _refuse(config: Any, missing: list[str]) -> None:
    """Raise UnknownHost where `config` names a strategy."""
    name = getattr(config, "cache_implementation", None)
    if not is_ours(name):
        return
    try:
        parse(name, told(getattr(config, "cache_config", None))[1])
    except UnknownStage:
        return  # perhaps a new name of transformers
    except KvplugError:
        pass  # one of ours all the same
    raise UnknownHost(f"{name!r}: {compat.advice(missing)}")


def _validate(original: Any) -> Any:
    @functools.wraps(original)
    def validate(self: GenerationConfig, *args: Any, **kwargs: Any) -> None:
        if not is_ours(self.cache_implementation):
            return original(self, *args, **kwargs)
        try:
            reuse, stages = told(self.cache_config)
            strategy = parse(self.cache_implementation, stages)
        except UnknownStage as e:
            theirs = ", ".join(compat.THEIR_NAMES)
            raise UnknownStage(f"{e} Names of transformers: {theirs}.") from None
        # transformers judges the rest, on a copy: the caller's object may be shared between threads
        static = isinstance(strategy, Strategy) and strategy.layout.reserves
        if reuse is not None and isinstance(strategy, Strategy):
            reuse.check(strategy)
        return original(_without_ours(self, static), *args, **kwargs)

    return validate


def _prepare_config(original: Any) -> Any:
    @functools.wraps(original)
    def _prepare_generation_config(self: GenerationMixin, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if is_ours(result[0].cache_implementation):
            # the class whose method `generate` is going to call
            owner = next(c for c in type(self).__mro__ if compat.PREPARE_CACHE in vars(c))
            if owner is not GenerationMixin:
                _wrap(owner, compat.PREPARE_CACHE, _watched)
        return result

    return _prepare_generation_config


def _watched(original: Any) -> Any:
    """A model's own way to prepare its cache: an error where it does not come to ours."""

    @functools.wraps(original)
    def _prepare_cache_for_generation(self: GenerationMixin, *args: Any, **kwargs: Any) -> Any:
        # by type: an override may call its parameters anything
        given = (*args, *kwargs.values())
        config = next(x for x in given if isinstance(x, GenerationConfig))
        model_kwargs = next(x for x in given if isinstance(x, dict))
        name = config.cache_implementation
        asked = is_ours(name) and not cache_in(model_kwargs)
        result = original(self, *args, **kwargs)
        if asked and not isinstance(_decoder_cache(cache_in(model_kwargs)), Cache):
            raise SpecError(
                f"{type(self).__name__} prepares a cache of its own kind: "
                f"cache_implementation={name!r} cannot apply; leave it out for this model"
            )
        return result

    return _prepare_cache_for_generation


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

        # what is not said of a decoder is its encoder's
        decoder = "decoder_" if self.config.is_encoder_decoder else ""
        mask = model_kwargs.get(f"{decoder}attention_mask")
        told_length = getattr(generation_config, compat.MASK_LENGTH, None)
        prompt = told_length if mask is None else mask.shape[-1]  # None: not known

        def tell(cache: Cache) -> None:
            """What a call brings."""
            cache.set_padding(mask)
            if mask is None and prompt:
                cache.expect(prompt)
            refused = bias.refusal_of_attentions(self.config, cache)
            if refused and generation_config.output_attentions:
                raise SpecError(refused)
            if (position_ids := model_kwargs.get(f"{decoder}position_ids")) is not None:
                cache.check_positions(position_ids, mask)

        # prompt lookup guesses beyond the last token
        reserve = max_cache_length + (generation_config.prompt_lookup_num_tokens or 0)
        given = cache_in(model_kwargs)
        name = generation_config.cache_implementation
        ours = is_ours(name)
        if ours and given is None and generation_config.use_cache is False:
            raise SpecError(
                f"cache_implementation={name!r} cannot apply: use_cache is False; pass True"
            )
        if not ours or given is not None:
            own = _decoder_cache(given)
            if isinstance(own, Cache):
                own.check_layers(self.config)
                tell(own)
                own.ensure_room(reserve)
                if own is not given:
                    compat.put_cache(model_kwargs, given, Pair.of(given, own))
            if ours and generation_config.is_assistant:
                # an assistant's later rounds bring the cache of the first, and the target's config
                generation_config = _without_ours(generation_config, static=False)
            return prepare(generation_config)
        builds = compat.builds_own_cache(self)
        if builds and not compat.is_minimax(self.config):
            raise SpecError(
                f"{type(self).__name__} builds its own kind of cache: "
                f"cache_implementation={name!r} cannot apply; leave it out for this model"
            )
        # of a decoder alone no model could be built, to see what it writes
        whole = self.config.is_encoder_decoder
        config = self.config if whole else self.config.get_text_config(decoder=True)
        asked, chosen = parse(name, told(generation_config.cache_config)[1]), None
        if isinstance(asked, Auto):
            choice = choose(
                asked,
                config,
                context=reserve,
                batch=_rows(call.arguments["batch_size"], generation_config),
                dtype=self.dtype,
                device=self.device,
                decoded=reserve - prompt if prompt else None,
            )
            asked, chosen = choice.strategy, choice.reason
            logger.info("kvplug: auto chose %s", chosen)
        strategy = asked.resolve(
            config,
            max_cache_len=max(reserve, generation_config.max_cache_len or 0),
            open_ended=generation_config.is_assistant,
        )
        cache = build(strategy, config, cache_config=generation_config.cache_config)
        cache.chosen = chosen
        cache.outlives = bool(generation_config.return_dict_in_generate)
        # what the caller has not fixed, a later call with this cache may change
        cache.may_grow = asked.layout.limit is None and not generation_config.max_cache_len
        tell(cache)
        result = prepare(_without_ours(generation_config, static=False))
        theirs = cache_in(model_kwargs)
        if theirs is None and not builds:
            raise SpecError(
                f"transformers prepared no cache for {type(self).__name__}: "
                f"{name!r} cannot take its place"
            )
        pair = isinstance(theirs, compat.EncoderDecoderCache)
        compat.put_cache(model_kwargs, theirs, Pair.of(theirs, cache) if pair else cache)
        if generation_config.is_assistant:
            cache.activate_past_recording()
        return result

    return _prepare_cache_for_generation


def _rows(batch: int, config: GenerationConfig) -> int:
    """Rows of the cache: those of the prompt, once for each beam or sequence returned."""
    return batch * max(config.num_beams or 1, config.num_return_sequences or 1)


def cache_in(model_kwargs: dict) -> Any:
    """The cache among a model's arguments, whatever its name, None without one."""
    given = (model_kwargs.get(key) for key in compat.CACHE_ARGUMENTS)
    return next((x for x in given if x is not None), None)


def _decoder_cache(cache: Any) -> Any:
    """The decoder's own, where the cache is that of an encoder and decoder."""
    return cache.self_attention_cache if isinstance(cache, compat.EncoderDecoderCache) else cache


def _prefilled(original: Any) -> Any:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def _prefill(self: GenerationMixin, *args: Any, **kwargs: Any) -> Any:
        call = signature.bind(self, *args, **kwargs)
        said = call.arguments
        cache = _decoder_cache(cache_in(said["model_kwargs"]))
        if isinstance(cache, Cache) and cache.reuse is not None:
            said["input_ids"] = fill(
                self,
                cache,
                said["input_ids"],
                said["generation_config"],
                said["model_kwargs"],
                functools.partial(original, self),
            )
        return original(*call.args, **call.kwargs)

    return _prefill


def _assisted(original: Any) -> Any:
    @functools.wraps(original)
    def _assisted_decoding(self: GenerationMixin, *args: Any, **kwargs: Any) -> Any:
        ours = [x for x in map(_decoder_cache, kwargs.values()) if isinstance(x, Cache)]
        for cache in ours:
            if cache.reuse is not None:
                fall_back(cache.reuse, "assisted decoding")
        try:
            return original(self, *args, **kwargs)
        finally:
            for cache in ours:
                cache.deactivate_past_recording()

    return _assisted_decoding


def _without_ours(config: GenerationConfig, static: bool) -> GenerationConfig:
    """A shallow copy that names a cache of transformers instead."""
    plain = copy.copy(config)
    plain.cache_implementation = "static" if static else None
    plain.cache_config = None
    return plain
