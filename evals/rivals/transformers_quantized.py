"""transformers' QuantizedCache as it comes: quanto, 4 bits, groups of 64, the newest 128 tokens in
full precision.
"""

from transformers import Cache, PreTrainedConfig, QuantizedCache


def build(config: PreTrainedConfig, max_cache_len: int) -> Cache:
    """Return an empty cache; the length is not needed. Needs `optimum-quanto`."""
    return QuantizedCache("quanto", config, nbits=4)
