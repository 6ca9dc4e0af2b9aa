"""LoRA adapters of peft, switched between calls, each call with a cache chosen by name.

A cache belongs to one call, so adapters may change between calls; keys and values of one adapter
are wrong for another, so a cache that is passed on must not outlive the switch. Printed per
adapter: whether lossless caches give what transformers' own gives, and what int4 gives. The
adapters are random, so the text is odd; it differs between them, which is the point.

    python examples/switch_adapters.py [--tiny] [--model ID] [--new-tokens 30]
"""

from contextlib import nullcontext

import torch
from common import continued, load, options
from peft import LoraConfig, get_peft_model

import kvplug  # noqa: F401  the import makes the names known

CACHES = (None, "growing", "host", "int4(tail=0, block=16)")


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--new-tokens", type=int, default=30)
    args = parser.parse_args()
    model, tokenizer = load(args)
    targets = ["q_proj", "k_proj", "v_proj"]
    lora = LoraConfig(
        r=4, target_modules=targets, init_lora_weights="gaussian", task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, lora, adapter_name="first")
    model.add_adapter("second", lora)
    for name, weight in model.named_parameters():
        if "lora_B" in name:  # zero before training: the adapter would do nothing
            torch.nn.init.normal_(weight, std=0.3 if args.tiny else 0.02)
    model.eval()

    def text(cache: str | None) -> str:
        return continued(model, tokenizer, cache, args.new_tokens)

    for adapter in ("first", "second", "first", "none"):
        if adapter != "none":
            model.set_adapter(adapter)
        with model.disable_adapter() if adapter == "none" else nullcontext():
            first = None
            for cache in CACHES:
                written = text(cache)
                first = written if first is None else first
                same = "the same text" if written == first and cache else repr(written[:60])
                print(f"{adapter:<8} {cache or 'transformers':<24} {same}")


if __name__ == "__main__":
    main()
