"""The ways a model is called, and when two runs of one call agree."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache, GenerationMixin, LogitsProcessor

from ..compat import cache_argument, output_cache
from ..factory import build
from ..spec import PREFIX
from .architectures import Architecture, make
from .shadow import Wrong
from .tools import left_padded, normal, prompt, seeded

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

NEW = 12  # tokens generated
NEW_ALONE = 28  # where the prompt goes to an encoder
# logits of two ways to compute the same float32 model, relative to the largest
TOLERANCE = 3e-4


@dataclass
class Run:
    """What a call gave: token ids [B, T], next-token scores [B, V] a step, of beams [B] instead."""

    sequences: Tensor
    logits: tuple[Tensor, ...]
    attentions: tuple[tuple[Tensor, ...], ...] = ()
    scores: Tensor | None = None


@dataclass
class Caller:
    """One model, to be called with a strategy or, without, as transformers does by default.

    Where transformers' own cache answers wrongly, it does without.
    """

    name: str
    architecture: Architecture
    model: Any
    spec: str | None = None
    before: Callable[[], None] = lambda: None  # told when the part that counts begins
    text: Tensor | None = None  # of the float32 model, for `in_dtype`

    @property
    def new(self) -> int:
        """Tokens to generate, so that every text has about 30."""
        return NEW_ALONE if self.architecture.source else NEW

    def generate(self, inputs: dict[str, Any], **kwargs: Any) -> Any:
        """`generate` with all that is compared."""
        if cache_argument(None).keys().isdisjoint(kwargs):
            kwargs["cache_implementation"] = None if self.spec is None else PREFIX + self.spec
        settings = {
            "do_sample": False, "max_new_tokens": self.new, "return_dict_in_generate": True,
            "output_logits": True,
        }  # fmt: skip
        if self.spec is None and self.architecture.uncached:
            # weights of attention are compared a step at a time; one row without beams is right
            settings["use_cache"] = bool(kwargs.get("output_attentions"))
        if self.architecture.typed and "token_type_ids" not in inputs:
            inputs = inputs | as_text(inputs.get("input_ids", inputs.get("inputs_embeds")))
        torch.manual_seed(0)
        self.before()
        # not model.generate: Whisper's own transcribes, in pieces, by other rules
        return GenerationMixin.generate(self.model, **inputs, **(settings | kwargs))

    def run(self, inputs: dict[str, Any], **kwargs: Any) -> Run:
        """`generate`, and what is compared of it."""
        out = self.generate(inputs, **kwargs)
        attentions = getattr(out, "decoder_attentions", None) or getattr(out, "attentions", None)
        scores = getattr(out, "sequences_scores", None)
        return Run(out.sequences, tuple(out.logits), attentions or (), scores)

    def inputs(self, ids: Tensor) -> dict[str, Any]:
        """What the model is fed for a prompt: ids, or a sound for models that only hear."""
        B = len(ids)
        if self.architecture.source == "speech":
            return {"input_features": normal(B, 8, 40, seed=int(ids.sum()))}
        if self.architecture.source == "wave":
            return {"input_values": normal(B, 4000, seed=int(ids.sum()))}
        return {"input_ids": ids}

    def cache(self) -> Any:
        """A new cache for 128 tokens."""
        config = self.model.config
        if self.spec is None:
            return DynamicCache(config=config.get_text_config(decoder=True))
        return build(self.spec, config, max_cache_len=128)


class NoSuchCall(Exception):
    """The architecture cannot be called so, whatever its cache."""


def greedy(caller: Caller) -> Run:
    """One row, token by token."""
    return caller.run(caller.inputs(prompt(17)))


ROWS = (21, 7)  # tokens


def padded(caller: Caller) -> Run:
    """Two rows of unlike length, padded on the left."""
    if caller.architecture.source:
        return caller.run(caller.inputs(prompt(17, 2)))
    return caller.run(left_padded([prompt(n, seed=n)[0] for n in ROWS]))


def alone(caller: Caller) -> list[Run]:
    """The rows of `padded`, each in a call of its own."""
    return [caller.run(caller.inputs(prompt(n, seed=n))) for n in ROWS]


def beams(caller: Caller) -> Run:
    """Three beams."""
    return caller.run(caller.inputs(prompt(17, 2)), num_beams=3, output_scores=True)


def sampled(caller: Caller) -> Run:
    """Three sequences drawn from one prompt, by a seed."""
    return caller.run(caller.inputs(prompt(17)), do_sample=True, num_return_sequences=3, top_k=20)


def lookup(caller: Caller) -> Run:
    """Guesses looked up in the prompt."""
    return caller.run(caller.inputs(prompt(6).repeat(1, 3)), prompt_lookup_num_tokens=3)


def assisted(caller: Caller) -> Run:
    """Guesses of an assistant that is often wrong: the same model, a little off."""
    assistant = make(caller.name)
    with torch.no_grad():
        for i, x in enumerate(assistant.parameters()):
            x += 0.1 * x.std(correction=0) * torch.randn(x.shape, generator=seeded(i))
    return caller.run(caller.inputs(prompt(17)), assistant_model=assistant)


def second(caller: Caller) -> Run:
    """A second turn with the cache that the first returned."""
    _needs_ids(caller)
    out = caller.generate(caller.inputs(prompt(17)), max_new_tokens=8)
    ids = torch.cat((out.sequences, prompt(5, seed=4)), 1)
    return caller.run(unmasked(ids), **cache_argument(output_cache(out)))


def cropped(caller: Caller) -> Run:
    """Five tokens taken back, then others."""
    _needs_ids(caller)
    cache, ids = caller.cache(), prompt(24)  # after `crop` more than any method keeps
    cache.activate_past_recording()
    with torch.no_grad():
        for part, at in ((ids, 0), (prompt(5, seed=3), 24)):
            more = as_text(part) if caller.architecture.typed else {}
            if type(caller.model).__name__.startswith("Bamba"):  # it counts from 0 in each forward
                more["position_ids"] = torch.arange(at, at + part.shape[1])[None]
            caller.model(part, **more, **cache_argument(cache))
    cache.crop(-5)
    ids = torch.cat((ids, prompt(4, seed=4)), 1)
    return caller.run(unmasked(ids), **cache_argument(cache))


def embeds(caller: Caller) -> Run:
    """A prompt of embeddings instead of ids."""
    _needs_ids(caller)
    with torch.no_grad():
        x = caller.model.get_input_embeddings()(prompt(17))
    return caller.run({"inputs_embeds": x})


def chunked(caller: Caller) -> Run:
    """The prompt in pieces of five tokens."""
    return caller.run(caller.inputs(prompt(17)), prefill_chunk_size=5)


def eager(caller: Caller) -> Run:
    """Attention written out, which reads keys and values as plain tensors."""
    return _with_attention(caller, "eager")


def attentions(caller: Caller) -> Run:
    """The same, and it returns its weights."""
    return _with_attention(caller, "eager", output_attentions=True)


def bfloat16(caller: Caller) -> Run:
    """A model in bfloat16."""
    return in_dtype(caller, torch.bfloat16)


def float16(caller: Caller) -> Run:
    """A model in float16."""
    return in_dtype(caller, torch.float16)


def media(caller: Caller) -> Run:
    """A picture or a sound in the prompt."""
    if caller.architecture.media is None:
        raise NoSuchCall("sees and hears nothing beside text")
    return caller.run(caller.architecture.media(prompt(13, 2)))


def as_text(x: Tensor) -> dict[str, Tensor]:
    """Types of tokens [B, S] (or their embeddings) that are no picture's, as processors give."""
    return {"token_type_ids": torch.zeros(x.shape[:2], dtype=torch.long)}


def unmasked(ids: Tensor) -> dict[str, Tensor]:
    """A text of which nothing is padding, whatever ids a model has chosen."""
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _needs_ids(caller: Caller) -> None:
    if caller.architecture.source:
        raise NoSuchCall("its prompt goes to an encoder")


def _with_attention(caller: Caller, name: str, **kwargs: Any) -> Run:
    before = caller.model.config._attn_implementation
    caller.model.set_attn_implementation(name)
    try:
        return caller.run(caller.inputs(prompt(17)), **kwargs)
    finally:
        caller.model.set_attn_implementation(before)


class Forced(LogitsProcessor):
    """Lets the next token be that of a text [B, T]."""

    def __init__(self, text: Tensor) -> None:
        self.text = text

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] of which one per row is finite."""
        token = self.text[:, input_ids.shape[1]]
        return torch.full_like(scores, -torch.inf).scatter(1, token[:, None], 0.0)


def in_dtype(caller: Caller, dtype: torch.dtype) -> Run:
    """The text of the float32 model word for word, so that roundings cannot choose another."""
    inputs = caller.inputs(prompt(17, 2))
    if caller.text is None:
        caller.text = GenerationMixin.generate(
            caller.model, **inputs, do_sample=False, max_new_tokens=caller.new
        )
    model, caller.model = caller.model, copy.deepcopy(caller.model).to(dtype)
    try:
        inputs = {k: x.to(dtype) if x.is_floating_point() else x for k, x in inputs.items()}
        return caller.run(inputs, logits_processor=[Forced(caller.text)])
    finally:
        caller.model = model


CALLS: dict[str, Callable[[Caller], Run]] = {
    "greedy": greedy,
    "left-padded batch": padded,
    "beams": beams,
    "sampled sequences": sampled,
    "prompt lookup": lookup,
    "assistant": assisted,
    "second turn": second,
    "crop, go on": cropped,
    "inputs_embeds": embeds,
    "chunked prefill": chunked,
    "eager": eager,
    "output_attentions": attentions,
    "bfloat16": bfloat16,
    "float16": float16,
    "picture or sound": media,
}


# --------------------------------------------------------------------------------------- agreement


def check_equal(got: Run, wanted: Run) -> None:
    """Raise `Wrong` unless both are the same text by the same scores.

    Scores are compared as long as the texts are equal; these part only where two score alike.
    """
    if got.scores is not None:
        _close("scores of beams", got.scores, wanted.scores, TOLERANCE)
        return  # beams that score alike may come in another order
    if len(got.sequences) != len(wanted.sequences):
        raise Wrong(f"{len(got.sequences)} rows, not {len(wanted.sequences)}")
    new = [x.sequences[:, -len(x.logits) :] for x in (got, wanted)]
    equal = torch.ones(len(new[0]), dtype=torch.bool)
    for step, (a, b) in enumerate(zip(got.logits, wanted.logits, strict=False)):
        if not equal.any():
            return
        _close(f"logits of step {step}", a[equal], b[equal], TOLERANCE)
        equal &= new[0][:, step] == new[1][:, step]
    if equal.any() and new[0].shape != new[1].shape:
        raise Wrong(f"{new[0].shape[1]} new tokens, not {new[1].shape[1]}")
    for step, (ours, theirs) in enumerate(zip(got.attentions, wanted.attentions, strict=True)):
        if not equal.all():
            return
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            if a is None and b is None:
                continue
            T = min(a.shape[-1], b.shape[-1])  # the rest is room, or was already behind a window
            what = f"attention of step {step}, layer {i}"
            if a.shape[-1] != b.shape[-1] and bool(a[..., T:].any()):
                raise Wrong(f"{what}: looks at empty room")
            _close(what, a[..., :T], b[..., -T:] if b.shape[-1] > T else b, TOLERANCE)


def check_first(got: Run, wanted: Run, tolerance: float = TOLERANCE) -> None:
    """Raise `Wrong` unless the first scores are equal and all are numbers.

    Whatever a strategy loses, the tokens of one call see each other in full.
    """
    if not all(bool(x.isfinite().all()) for x in got.logits):
        raise Wrong("logits are not finite")
    _close("logits of step 0", got.logits[0], wanted.logits[0], tolerance)


def check_as_near(got: Run, theirs: Run, best: Run) -> None:
    """Raise `Wrong` unless a low-precision run is about as near to float32 as transformers' own."""
    errors = [
        float(
            torch.stack(
                [(a.float() - b).abs().mean() for a, b in zip(x.logits, best.logits, strict=True)]
            ).mean()
        )
        for x in (got, theirs)
    ]
    size = float(torch.stack([x.abs().mean() for x in best.logits]).mean())
    if not errors[0] <= 3 * errors[1] + 0.01 * size:
        raise Wrong(f"{errors[0]:.3g} from float32 in the mean, DynamicCache {errors[1]:.3g}")


def _close(what: str, a: Tensor, b: Tensor, tolerance: float) -> None:
    a, b = a.float(), b.float()
    if a.shape != b.shape:
        raise Wrong(f"{what}: {tuple(a.shape)}, not {tuple(b.shape)}")
    same = (a == b) | ~b.isfinite() & ~a.isfinite()
    error = torch.where(same, 0.0, (a - b).abs())
    bound = tolerance * max(1.0, float(torch.where(b.isfinite(), b, 0.0).abs().max()))
    if not bool((error <= bound).all()):
        raise Wrong(f"{what}: {float(error.max()):.3g} off, {bound:.2g} allowed")
