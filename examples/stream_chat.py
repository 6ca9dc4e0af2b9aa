"""A chat through `pipeline`, each answer streamed while it is written, the cache chosen by name.

The pipeline keeps its cache to itself: each turn reads the whole chat again, into a new cache of
the named strategy. Printed: the chat, and after each answer the cache it was written with.

    python examples/stream_chat.py [--tiny] [--model ID] [--cache int4] [--new-tokens 60]
"""

from concurrent.futures import ThreadPoolExecutor

from common import load, mib, options
from transformers import TextIteratorStreamer, pipeline

import kvplug  # noqa: F401  the import makes the names known
from kvplug.compat import output_cache

QUESTIONS = ("What is the capital of France?", "Name three things to see there.")


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--cache", default="int4", help="default: int4")
    parser.add_argument("--new-tokens", type=int, default=60)
    args = parser.parse_args()
    model, tokenizer = load(args)
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    last = {}
    model.register_forward_hook(lambda module, given, out: last.update(cache=output_cache(out)))

    def answer(chat: list[dict], streamer: TextIteratorStreamer) -> list[dict]:
        try:
            out = pipe(
                chat,
                streamer=streamer,
                cache_implementation=args.cache,
                max_new_tokens=args.new_tokens,
                do_sample=False,
            )
            return out[0]["generated_text"]
        finally:
            streamer.end()  # the reader below ends, whatever was raised here

    chat = [{"role": "system", "content": "You answer in one sentence."}]
    with ThreadPoolExecutor(1) as pool:
        for question in QUESTIONS:
            print(f"> {question}")
            chat = [*chat, {"role": "user", "content": question}]
            streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
            written = pool.submit(answer, chat, streamer)
            for piece in streamer:
                print(piece, end="", flush=True)
            chat = written.result()
            cache = last["cache"]
            print(f"\n  [{cache.strategy}: {cache.get_seq_length()} tokens, {mib(cache.nbytes())}]")


if __name__ == "__main__":
    main()
