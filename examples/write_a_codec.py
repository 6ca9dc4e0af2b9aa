"""Write a codec of your own in one file, use it by name, and measure its drift.

The codec stores keys and values as 8-bit floats with one scale per token. Drift is the KL
divergence of the next-token distribution from the exact cache's. Text is fed in chunks of 64:
within one forward pass attention sees that pass's own keys and values as they came, so a single
pass over the whole text would measure nothing.

    python examples/write_a_codec.py [--tiny] [--model ID] [--tokens 1024]
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from common import document, load, mib, options
from torch import Tensor

import kvplug
from kvplug.compat import cache_argument

SCALES = "k_scale", "v_scale"


@dataclass(frozen=True)
class E4M3(kvplug.Codec):
    """8-bit floats (4 bits of exponent, 3 of mantissa), one float32 scale per head and token."""

    name: ClassVar[str] = "e4m3"
    block: int = kvplug.option(64, "tokens per block", ge=1)
    tail: int = kvplug.option(0, "newest tokens kept in full precision", ge=0)

    def encode_side(self, x: Tensor, side: int) -> dict[str, Tensor]:
        """Keys (side 0) or values (1) [B, H, N, block, D] -> codes as bytes, and their scales."""
        scale = x.float().abs().amax(-1, keepdim=True).clamp_min(1e-30) / 448  # the largest e4m3
        codes = (x.float() / scale).to(torch.float8_e4m3fn)
        return {"kv"[side]: codes.view(torch.uint8), SCALES[side]: scale}

    def decode_side(self, data: dict[str, Tensor], side: int) -> Tensor:
        return data["kv"[side]].view(torch.float8_e4m3fn).float() * data[SCALES[side]]

    def max_error(self, data: dict[str, Tensor], side: int) -> Tensor:
        return 448 * data[SCALES[side]] / 2**4  # half of 2**-3 of the largest


@torch.no_grad()
def predictions(model, ids: Tensor, cache: kvplug.Cache) -> Tensor:
    """Log-probabilities [T, V] of ids [1, T], fed in chunks that attend to what the cache kept."""
    logits = [model(chunk, **cache_argument(cache)).logits[0] for chunk in ids.split(64, dim=1)]
    return torch.cat(logits).float().log_softmax(-1)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--tokens", type=int, default=None, help="of text to measure on (1024)")
    args = parser.parse_args()
    model, tokenizer = load(args)
    kvplug.add(E4M3)

    inputs = tokenizer("A cache is", return_tensors="pt").to(model.device)
    out = model.generate(**inputs, cache_implementation="e4m3", max_new_tokens=20, do_sample=False)
    print(f"generate: {tokenizer.decode(out[0])!r}")

    tokens = args.tokens or (256 if args.tiny else 1024)
    ids = tokenizer(document()[: 20 * tokens], return_tensors="pt", verbose=False).input_ids
    ids = ids[:, :tokens].to(model.device)
    exact = predictions(model, ids, kvplug.build("growing", model.config))
    for name in ("growing", "int8", "e4m3", "int4"):
        cache = kvplug.build(name, model.config)
        drift = exact.exp() * (exact - predictions(model, ids, cache))
        print(f"{name:<8} {mib(cache.nbytes()):>10}   KL {float(drift.sum(-1).mean()):.6f}")


if __name__ == "__main__":
    main()
