"""Ask about a long document on little memory.

The document is read in chunks of 512 tokens, so that the prompt's own activations stay small, and
a question is asked at its end: once with the exact cache and once with `int4`. Printed: bytes held
at the end, the highest memory of the process above the model's own on the way (where the system can
tell), and the answers as they come. A model of 135M parameters answers badly with either cache;
`int4` moves its predictions a little, so that the words may differ.

    python examples/long_document.py [--tiny] [--model ID] [--file TEXT] [--question TEXT]
"""

import time
from pathlib import Path

from common import document, load, mib, options

import kvplug  # noqa: F401  the import makes the names known
from evals.measure.memory import held_bytes
from evals.measure.peaks import Resident
from kvplug.compat import output_cache

QUESTION = "What is the document above about? Answer in one sentence."


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--file", type=Path, help="default: Python's language reference")
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--context", type=int, default=None, help="tokens of it to read (6000)")
    parser.add_argument("--new-tokens", type=int, default=60)
    args = parser.parse_args()
    model, tokenizer = load(args)
    text = args.file.read_text() if args.file else document()
    context = args.context or (700 if args.tiny else 6000)
    text = tokenizer.decode(tokenizer(text, verbose=False).input_ids[:context])
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": f"{text}\n\n{args.question}"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    ).to(model.device)
    S = prompt.input_ids.shape[1]
    print(f"{S:,} tokens of prompt. {args.question}")

    model.generate(prompt.input_ids[:, :8], max_new_tokens=1)  # weights are read from disk on use
    for name in ("growing", "int4"):
        peak, start = Resident(), time.perf_counter()
        peak.start()
        out = model.generate(
            **prompt,
            cache_implementation=name,
            prefill_chunk_size=128 if args.tiny else 512,
            max_new_tokens=args.new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
        )
        seconds, top = time.perf_counter() - start, peak.stop()
        answer = tokenizer.decode(out.sequences[0, S:], skip_special_tokens=True)
        print(
            f"{name:<8} held {mib(held_bytes(output_cache(out)))}, "
            f"peak {mib(top) if top is not None else 'unknown'}, {seconds:.1f} s: {answer!r}"
        )


if __name__ == "__main__":
    main()
