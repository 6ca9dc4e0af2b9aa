"""Caches that kvplug is measured against: one small file each.

A file `<who>_<what>.py` is the row `<who>:<what>`. It says in its docstring what the cache is, and
has one function, `build(config, max_cache_len) -> Cache`. Its imports belong inside that function
where they are optional, so that a rival that is not installed is a row that says so.
"""

from __future__ import annotations

import pkgutil


def names() -> list[str]:
    """Return the rows that the files here add."""
    return sorted(module.name.replace("_", ":", 1) for module in pkgutil.iter_modules(__path__))
