"""How tests call `generate`: the same tokens each time, a dozen or two."""

GREEDY = {"do_sample": False, "max_new_tokens": 12}
LONGER = GREEDY | {"max_new_tokens": 24}
