"""How a layer holds its tokens, and how room for them is reserved: `growing`, `static`."""
