"""How tests call `generate`: the same tokens each time, a dozen."""

GREEDY = {"do_sample": False, "max_new_tokens": 12}
