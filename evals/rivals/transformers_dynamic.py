"""transformers' DynamicCache: one `torch.cat` per layer and step. The exact cache that all else is
compared to.
"""

from transformers import Cache, DynamicCache, PreTrainedConfig


def build(config: PreTrainedConfig, max_cache_len: int) -> Cache:
    """Return an empty cache; the length is not needed."""
    return DynamicCache(config=config)
