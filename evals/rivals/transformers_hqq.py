"""transformers' QuantizedCache by hqq: 4 bits, groups of 64, the newest 128 tokens in full
precision.
"""

from transformers import Cache, PreTrainedConfig, QuantizedCache


def build(config: PreTrainedConfig, max_cache_len: int) -> Cache:
    """Return an empty cache; the length is not needed. Needs `hqq`."""
    return QuantizedCache("hqq", config, nbits=4, axis_key=1, axis_value=1)
