"""Models whose own bias or mask is made for all tokens seen, whatever a cache keeps.

Such a bias has one column for each column of the padding mask (alibi), or counts the distance to
the keys it gets from the first token on (relative buckets): it is right only for a cache that hands
out all columns. What is not visible cannot be cut off from outside, as the model adds the bias to
the scores itself. MPT cuts it to the keys it gets, and is served like any other model. GPT-Neo's
causal mask is of its own making and takes the last column for the newest token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import compat

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from .cache import Cache
    from .spec import Strategy


def refusals(config: PreTrainedConfig, strategy: Strategy) -> tuple[str | None, str | None]:
    """Why a strategy cannot serve the model of `config` at all, and why not a padded batch."""
    model, windowed = type(config).__name__, strategy.retention.drops
    if windowed and hasattr(config, "relative_attention_num_buckets"):  # T5 and its kin
        return (
            f"the position bias of {model} counts keys from the first token on, of which "
            f"{strategy} drops some: use full, with any codec and placement, as in 'int8+host'",
            None,
        )
    compiled = strategy.layout.is_compileable(strategy)
    if compiled and config.model_type == "gpt_neo":
        return (
            f"the causal mask of {model} takes the last column for the newest token, and "
            f"{strategy} has empty room there: use full+growing, with any codec and placement",
            None,
        )
    bloom = config.model_type == "bloom"
    if not (bloom or getattr(config, "alibi", False)) or not (windowed or compiled):
        return None, None
    why = (
        f"the alibi bias of {model} has a column for each token seen, and {strategy} gives "
        "attention another number of columns"
    )
    # newer BLOOMs ask the cache for its columns where nothing is padded
    if bloom and hasattr(compat.modeling(config), "_get_alibi_slopes"):
        if compiled and not strategy.is_coded:
            return None, None  # the mask is padded to all room
        return None, (
            f"{why}: for rows of unlike length use full+growing, with any codec and placement, or "
            "one row at a time"
        )
    return f"{why}: use full+growing, with any codec and placement, as in 'int8+host'", None


def refusal_of_attentions(config: PreTrainedConfig, cache: Cache) -> str | None:
    """Why a cache cannot serve a call with `output_attentions`.

    Falcon then adds its mask to the scores itself, which under sdpa is one of True and False; a
    cache with empty room always has a mask.
    """
    if config.model_type != "falcon" or not cache.is_compileable or not compat.is_sdpa(config):
        return None
    return (
        f"output_attentions of {type(config).__name__} with {cache.strategy} are wrong under sdpa: "
        "load the model with attn_implementation='eager', or use full+growing"
    )
