"""A chat without end: `sinks` keeps memory and time per token flat, far beyond the trained length.

One cache serves all turns: each turn feeds only its new tokens. The oldest turns are forgotten
but for the first four tokens, the attention sinks; the model still speaks, it just does not
remember them. Printed after each 1,000 tokens: bytes held, ms per token of that stretch (reading
the user's turns included), and a piece of the newest answer. Try `--cache growing` to compare.

    python examples/endless_chat.py [--tiny] [--model ID] [--tokens 20000]
"""

import time

import torch
from common import load, mib, options

import kvplug
from kvplug.compat import cache_argument

QUESTIONS = (
    "Tell me about a city you like.",
    "What should I cook tonight?",
    "Explain how rain forms.",
    "Write a short story about a lighthouse.",
    "How do I learn to play the piano?",
)


def turn(tokenizer, question: str, first: bool) -> torch.Tensor:
    """Tokens [1, S] that the chat template puts between two answers."""
    asked = [{"role": "user", "content": question}]
    before = [] if first else [*asked, {"role": "assistant", "content": "Yes."}]
    done = tokenizer.apply_chat_template(before, tokenize=False) if before else ""
    text = tokenizer.apply_chat_template(before + asked, tokenize=False, add_generation_prompt=True)
    return tokenizer(
        text.removeprefix(done), add_special_tokens=False, return_tensors="pt"
    ).input_ids


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--tokens", type=int, default=None, help="of the whole chat (20,000)")
    parser.add_argument("--cache", default=None, help="default: sinks(sinks=4, window=1020)")
    args = parser.parse_args()
    model, tokenizer = load(args)
    tokens, every = args.tokens or (800 if args.tiny else 20_000), 100 if args.tiny else 1_000
    name = args.cache or f"sinks(sinks=4, window={60 if args.tiny else 1020})"

    cache = kvplug.build(name, model.config)
    chat = torch.empty(1, 0, dtype=torch.long, device=model.device)
    spent, counted, turns = 0.0, 0, 0
    print(f"{cache.strategy}: trained for {model.config.max_position_embeddings:,} positions")
    while chat.shape[1] < tokens:
        question = QUESTIONS[turns % len(QUESTIONS)]
        chat = torch.cat((chat, turn(tokenizer, question, turns == 0).to(model.device)), dim=1)
        start, asked, turns = time.perf_counter(), chat.shape[1], turns + 1
        chat = model.generate(
            chat,
            attention_mask=torch.ones_like(chat),
            **cache_argument(cache),
            do_sample=True,  # a small model that decodes greedily soon repeats itself
            max_new_tokens=25 if args.tiny else 250,
            pad_token_id=tokenizer.eos_token_id,
        )
        spent += time.perf_counter() - start
        if chat.shape[1] - counted >= every:
            answer = tokenizer.decode(chat[0, asked:], skip_special_tokens=True)
            print(
                f"{chat.shape[1]:>6} tokens  held {mib(cache.nbytes())}  "
                f"{1000 * spent / (chat.shape[1] - counted):6.1f} ms/token  {answer[:50]!r}",
                flush=True,
            )
            spent, counted = 0.0, chat.shape[1]


if __name__ == "__main__":
    main()
