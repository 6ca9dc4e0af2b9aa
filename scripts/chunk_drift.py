"""What computing a prompt in chunks, each encoded before the next, does to predictions.

    python scripts/chunk_drift.py --dataset TEXT_FILE --windows 4

Feeds windows of text to the packaged model, 1,100 tokens as a prompt and 32 more to be predicted:
at once, as a call without a store does, and in chunks, as one beside a store does. Prints per cache
the KL divergence of the 32 from those of the exact cache at once, in nats, and how often the most
likely token is the same, both means over the windows.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import kvplug
from evals.setup import data, model
from kvplug.compat import cache_argument

if TYPE_CHECKING:
    from torch import Tensor

PROMPT, ASKED = 1100, 32
SPECS, CHUNKS = ("growing", "int4", "int3"), (None, 256)


@torch.no_grad()
def predictions(network: Any, ids: Tensor, spec: str, chunk: int | None) -> Tensor:
    """Log-probabilities [ASKED, V] after a prompt at once (chunk None) or beside a store."""
    prompt, asked = ids[None, :PROMPT], ids[None, PROMPT:]
    if chunk is None:
        cache = kvplug.build(spec, network.config)
        network(prompt, **cache_argument(cache), logits_to_keep=1)
    else:
        told = {"store": kvplug.Store("memory://"), "chunk": chunk}
        cache = kvplug.build(spec, network.config, cache_config=told)
        new = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
        mask = torch.ones_like(prompt)
        network.generate(prompt, attention_mask=mask, **new, **cache_argument(cache))
        if not told["store"].stats()["saved"] or int(cache.get_seq_length()) != PROMPT:
            raise RuntimeError(f"{spec}: the store was not used: {told['store'].stats()}")
    return network(asked, **cache_argument(cache)).logits[0].float().log_softmax(-1)


def main() -> None:
    """Print a line per cache and chunk."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dataset", required=True, help="a text file")
    parser.add_argument("--windows", type=int, default=4)
    args = parser.parse_args()
    network, tokenizer, _ = model.load()
    n = args.windows * (PROMPT + ASKED)
    windows = data.load(args.dataset, n).tokens(tokenizer, n)[:n].view(args.windows, -1)
    found: dict[tuple, list[tuple[float, float]]] = {}
    for ids in windows:
        exact = predictions(network, ids, "growing", None)
        for spec in SPECS:
            for chunk in CHUNKS:
                here = predictions(network, ids, spec, chunk)
                kl = (exact.exp() * (exact - here)).sum(-1).mean().item()
                same = (exact.argmax(-1) == here.argmax(-1)).float().mean().item()
                found.setdefault((spec, chunk), []).append((kl, same))
    for (spec, chunk), each in found.items():
        kl, same = map(statistics.mean, zip(*each, strict=True))
        how = "at once" if chunk is None else f"in chunks of {chunk}"
        print(f"{spec:8} {how:18} KL {kl:.5f}  top-1 {same:.4f}")


if __name__ == "__main__":
    main()
