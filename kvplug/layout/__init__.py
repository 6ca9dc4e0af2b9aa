"""How room for tokens is reserved: `growing` or `static`."""
