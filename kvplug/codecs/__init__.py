"""How a block of tokens is stored: one idea per file, all behind `base.Codec`."""
