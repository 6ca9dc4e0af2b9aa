"""Swap the cache of a pipeline with one string.

The same prompt, greedily continued through several caches. Printed: bytes that each cache holds at
the end (every tensor in it is walked, reserved room included), and the text it led to. The first
row is transformers' own cache; `growing` and `host` lose nothing, so their text must be the same.

    python examples/swap_cache.py [--tiny] [--model ID] [--new-tokens 100]
"""

from common import document, load, mib, options
from transformers import pipeline

import kvplug  # noqa: F401  the import makes the names known
from evals.measure.memory import held_bytes
from kvplug.compat import output_cache

CACHES = (
    None,
    "growing",
    "int8",
    "int4",
    "window(length=128)",
    "sinks(sinks=4, window=124)+int8",
    "host",
)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--new-tokens", type=int, default=100)
    args = parser.parse_args()
    model, tokenizer = load(args)
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    prompt = document()[: 600 if args.tiny else 3000]  # some 750 tokens

    last = {}  # a pipeline keeps its cache to itself: this looks at it
    model.register_forward_hook(lambda module, given, out: last.update(cache=output_cache(out)))

    first = None
    for name in CACHES:
        out = pipe(
            prompt,
            cache_implementation=name,
            max_new_tokens=args.new_tokens,
            do_sample=False,
            return_full_text=False,
        )
        text = out[0]["generated_text"]
        first = text if first is None else first
        same = "the same text" if text == first else repr(text[-60:])
        print(f"{name or 'transformers':<32} {mib(held_bytes(last['cache'])):>10}   {same}")


if __name__ == "__main__":
    main()
