"""How attention reads a cache: `reference` is the specification of all others."""
