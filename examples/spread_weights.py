"""A model larger than its memory: accelerate keeps some layers on disk, the cache is still a name.

`device_map` says where each layer's weights lie; accelerate brings them in for their turn. The
cache is built where the keys and values are, so no strategy needs to know. Printed: where the
weights are, and what each cache writes; `growing`, `host` and `disk` lose nothing.

    python examples/spread_weights.py [--tiny] [--model ID] [--new-tokens 20]
"""

import tempfile
from collections import Counter

from accelerate import dispatch_model
from common import continued, load, options

import kvplug  # noqa: F401  the import makes the names known

CACHES = (None, "growing", "host", "disk", "int4+host")


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--new-tokens", type=int, default=20)
    args = parser.parse_args()
    model, tokenizer = load(args)

    def text(cache: str | None) -> str:
        return continued(model, tokenizer, cache, args.new_tokens)

    whole = text(None)
    here, layers = str(model.device), len(model.model.layers)
    places = {
        f"model.layers.{i}": here if i < layers // 2 else "disk" for i in range(layers)
    } | dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), here)
    with tempfile.TemporaryDirectory() as folder:
        model = dispatch_model(model, places, main_device=here, offload_dir=folder)
        layers = Counter(place for name, place in places.items() if ".layers." in name)
        print("layers: " + ", ".join(f"{n} on {place}" for place, n in layers.items()))
        for cache in CACHES:
            written = text(cache)
            same = "the same text as the whole model" if written == whole else repr(written[-60:])
            print(f"{cache or 'transformers':<14} {same}")


if __name__ == "__main__":
    main()
