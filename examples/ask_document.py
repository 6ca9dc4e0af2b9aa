"""Ask one document from several processes: who comes second reads what the first has computed.

Run it as often as you like, in several terminals at once, with other questions; the store may be a
folder, or a Redis or Valkey that they share. Printed: tokens of the document that were found there,
and the seconds until the answer began. An answer is the same whether they were found or not.

    python examples/ask_document.py "What is a token?" [--store redis://localhost:6379/0]
        [--tiny] [--model ID] [--file TEXT]
"""

import time
from pathlib import Path

from common import document, load, options

import kvplug


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("question")
    parser.add_argument("--store", default=(Path.home() / ".cache" / "kvplug-store").as_uri())
    parser.add_argument("--file", type=Path)
    args = parser.parse_args()
    model, tokenizer = load(args)
    text = args.file.read_text(encoding="utf-8") if args.file else document()[:8000]
    prompt = tokenizer(f"{text}\n\nQuestion: {args.question}\nAnswer:", return_tensors="pt")
    store = kvplug.Store(args.store)
    asked = {**prompt, "cache_implementation": "int4", "cache_config": {"store": store}}

    start = time.perf_counter()
    model.generate(**asked, max_new_tokens=1, do_sample=False)
    seconds, found = time.perf_counter() - start, int(store.stats()["reused_tokens"])
    out = model.generate(**asked, max_new_tokens=24, do_sample=False)
    n = prompt.input_ids.shape[1]
    print(f"{found:,} of {n:,} tokens found, {seconds:.2f} s to the first token")
    print(tokenizer.decode(out[0, n:], skip_special_tokens=True))


if __name__ == "__main__":
    main()
