"""What runs in kvpress's own environment: texts compressed, then questions, in JSON by the line.

It imports nothing of this project, which that environment does not have. The first line of stdin
says `model` (a folder), `press` (a class of kvpress) and `kept` (tokens that a head keeps of a
prompt). Each other one is a text, `prompt` (tokens), and what comes behind it, `asks`: `more`
(tokens) and `choices` (tokens of answers, the right one first). Each is answered by a line: what
was held of the prompt, and of each of `asks` whether the right choice is the likeliest of them, and
of all.
"""

import copy
import json
import sys
from importlib.metadata import version

import kvpress
import torch
from transformers import AutoModelForCausalLM, DynamicCache


@torch.no_grad()
def main() -> None:
    """Answer until there is nothing more to read."""
    said = json.loads(sys.stdin.readline())
    model = AutoModelForCausalLM.from_pretrained(said["model"], dtype=torch.float32).eval()
    for line in sys.stdin:
        text = json.loads(line)
        prompt = torch.tensor([text["prompt"]])
        n = prompt.shape[1]
        # they keep the integer part of n * (1 - ratio): the half keeps rounding away from it
        press = getattr(kvpress, said["press"])(compression_ratio=1 - (said["kept"] + 0.5) / n)
        cache = DynamicCache(config=model.config)
        with press(model):
            model(input_ids=prompt, past_key_values=cache, logits_to_keep=1)
        held = [x for layer in cache.layers for x in (layer.keys, layer.values)]
        answers = []
        for ask in text["asks"]:
            more = torch.tensor([ask["more"]])
            out = model(
                input_ids=more,
                past_key_values=copy.deepcopy(cache),
                position_ids=torch.arange(n, n + more.shape[1])[None],
                logits_to_keep=1,
            )
            logits, (right, *wrong) = out.logits[0, -1].float(), ask["choices"]
            listed = bool(logits[right] > logits[wrong].max())
            answers.append({"listed": listed, "greedy": int(logits.argmax()) == right})
        told = {"bytes_held": sum(x.nbytes for x in held), "tokens_held": held[0].shape[2]}
        told |= {name: version(name) for name in ("kvpress", "transformers")}
        print(json.dumps(told | {"answers": answers}), flush=True)


if __name__ == "__main__":
    main()
