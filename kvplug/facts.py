"""What tells models of one kind from others, whose caches and calibrations are not theirs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FACTS = (  # of a config
    "model_type",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


def facts(config: PreTrainedConfig) -> dict[str, Any]:
    """What a model of this config has that one of another kind has not, in JSON's types."""
    text = config.get_text_config(decoder=True)
    configs = getattr(text, "per_layer_config", None) or [text]
    found = {name: [getattr(c, name, None) for c in configs] for name in FACTS}
    found = {name: x[0] if len(set(map(str, x))) == 1 else x for name, x in found.items()}
    return {name: x if isinstance(x, int | str | None) else str(x) for name, x in found.items()}


def difference(theirs: dict[str, Any], mine: dict[str, Any]) -> str | None:
    """The first fact in which two models differ; None where they are of one kind."""
    return next((name for name, x in mine.items() if theirs.get(name) != x), None)
