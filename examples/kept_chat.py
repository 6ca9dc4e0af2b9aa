"""A chat that survives a restart: each run of this script is one turn, in a process of its own.

What was said is kept as text, what it cost to read in a store beside it: the next turn, today or
next week, computes what is new. Printed: tokens found in the store, and the answer.

    python examples/kept_chat.py "Hello, who are you?" [--folder FOLDER] [--tiny] [--model ID]
"""

import json
from pathlib import Path

from common import load, options

import kvplug


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("message")
    parser.add_argument("--folder", type=Path, default=Path.home() / ".cache" / "kvplug-chat")
    args = parser.parse_args()
    model, tokenizer = load(args)
    args.folder.mkdir(parents=True, exist_ok=True)
    said = args.folder / "chat.json"
    chat = json.loads(said.read_text(encoding="utf-8")) if said.exists() else []
    chat.append({"role": "user", "content": args.message})
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )

    store = kvplug.Store((args.folder / "store").resolve().as_uri(), max_bytes="1GiB")
    out = model.generate(
        **prompt,
        max_new_tokens=60,
        do_sample=False,
        cache_implementation="int8",
        cache_config={"store": store, "chunk": 64},  # turns are short
    )
    n = prompt.input_ids.shape[1]
    answer = tokenizer.decode(out[0, n:], skip_special_tokens=True)
    chat.append({"role": "assistant", "content": answer})
    said.write_text(json.dumps(chat, indent=1), encoding="utf-8")
    print(f"{int(store.stats()['reused_tokens']):,} of {n:,} tokens found")
    print(answer)


if __name__ == "__main__":
    main()
