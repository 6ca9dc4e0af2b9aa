"""transformers' offloaded cache: each layer waits in host memory and is fetched one layer ahead,
by CUDA streams.
"""

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig


def build(config: PreTrainedConfig, max_cache_len: int) -> Cache:
    """Return an empty cache; the length is not needed. Needs a CUDA GPU."""
    if not torch.cuda.is_available():
        raise RuntimeError("transformers' offloading works by CUDA streams: no CUDA GPU is here")
    return DynamicCache(config=config, offloading=True)
