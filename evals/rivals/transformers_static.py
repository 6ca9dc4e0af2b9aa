"""transformers' StaticCache: allocated at full length at once, and attended to at full length at
every step.
"""

from transformers import Cache, PreTrainedConfig, StaticCache


def build(config: PreTrainedConfig, max_cache_len: int) -> Cache:
    """Return a cache for `max_cache_len` tokens."""
    return StaticCache(config=config, max_cache_len=max_cache_len)
