"""transformers' QuantizedCache in 8-bit floats: one scale per tensor, fixed by the first tokens."""

from transformers import Cache, PreTrainedConfig, QuantizedCache


def build(config: PreTrainedConfig, max_cache_len: int) -> Cache:
    """Return an empty cache; the length is not needed. Needs transformers >= 5.23."""
    return QuantizedCache("fp8", config)
