"""Caches that kvplug is measured against: one small module each.

A module called `<who>_<what>` is the row `<who>:<what>`. It says in its docstring what the cache
is, and has one function, `build(config, max_cache_len) -> Cache`. Imports that are optional belong
inside that function, so that a rival that is not installed is a row that says so.

What is no cache, and cannot run beside kvplug, has `answers(model, prompt, asks)` in its place:
suites `retrieval` and `unseen` ask it, with `prompt` and `asks` as `_kvpress_worker.py` explains.

A file here whose name does not begin with `_` is one. So is a module of another distribution under
the entry point `<who>_<what>`.
"""

from __future__ import annotations

import pkgutil
import warnings
from importlib.metadata import entry_points

GROUP = "kvplug.rivals"


def modules() -> dict[str, str]:
    """Return the module of each row, sorted by the rows' names.

    An entry point whose name is taken, or is none that a row can have, is left out with a warning.
    """
    files = (file.name for file in pkgutil.iter_modules(__path__))
    found = {name: f"{__name__}.{name}" for name in files if not name.startswith("_")}
    for entry in entry_points(group=GROUP):
        who, _, what = entry.name.partition("_")
        if found.get(entry.name, entry.value) != entry.value:
            reason = f"{found[entry.name]} has the name"
        elif not (who and what) or who in ("kvplug", "control"):
            reason = "names are WHO_WHAT, and kvplug and control are ours"
        else:
            found[entry.name] = entry.value
            continue
        warnings.warn(f"rival {entry.name!r} from {entry.value!r} ignored: {reason}", stacklevel=2)
    return {name.replace("_", ":", 1): found[name] for name in sorted(found)}
