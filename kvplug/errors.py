"""What kvplug raises.

KvplugError
├── SpecError (ValueError)        a strategy that cannot be: bad argument, stages that clash
│   └── UnknownStage              a name that no stage has
├── UnknownHost (RuntimeError)    a strategy named on a transformers that kvplug does not know
├── MissingExtra (ImportError)    a stage whose optional dependency is not installed
├── CacheOverflow (ValueError)    more tokens than a static cache was built for
├── Evicted (RuntimeError)        a rollback to tokens that are no longer kept
├── StoreError (ValueError)       a store that cannot be: scheme, option, model it cannot name
├── NoRoom (OSError)              the folder of `disk` cannot take more of a cache
├── Mismatch (ValueError)         another model, batch or dtype than a cache was filled with
├── Unseen (RuntimeError)         a retention that needs queries, and attention that shows none
├── NoGradient (RuntimeError)     a gradient through a cache or kernel that has none
└── ViewError (RuntimeError)      a view of the cache written to, or asked for its address
"""

from difflib import get_close_matches


class KvplugError(Exception):
    """Base of everything kvplug raises on purpose."""


class SpecError(KvplugError, ValueError):
    """A strategy that cannot be built: says the value, what is accepted and the nearest match."""


class UnknownStage(SpecError):
    """A name that no stage has."""


class UnknownHost(KvplugError, RuntimeError):
    """The installed transformers lacks what names need: says what, and which versions have it."""


class MissingExtra(KvplugError, ImportError):
    """A stage needs a package that is not installed: says the exact ``pip install``."""


class CacheOverflow(KvplugError, ValueError):
    """A static cache was given more tokens than it was built for."""


class Evicted(KvplugError, RuntimeError):
    """`crop` asked for tokens that retention has already dropped."""


class StoreError(KvplugError, ValueError):
    """A store that cannot be, or a model whose caches it cannot name: says what is accepted."""


class NoRoom(KvplugError, OSError):
    """The folder of `disk` cannot take more: `errno` says why, `filename` is the folder."""


class Mismatch(KvplugError, ValueError):
    """A cache was used with another model, batch or dtype than it was made for or filled with."""


class Unseen(KvplugError, RuntimeError):
    """Retention chooses by the queries of attention, and these do not come by: says what does."""


class NoGradient(KvplugError, RuntimeError):
    """A gradient was wanted through what a cache has stored, or through a kernel without one."""


class ViewError(KvplugError, RuntimeError):
    """A view was written to, which would be lost, or asked for the address of its memory."""


def unknown(what: str, value: object, accepted: list[str], note: str = "") -> str:
    """Say what is wrong: `unknown codec 'imt8'. Did you mean 'int8'? Known: int2, int4, int8.`."""
    near = get_close_matches(str(value).lower(), [a.lower() for a in accepted], n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    known = f" Known: {', '.join(accepted)}." if accepted else ""
    return f"unknown {what} {value!r}.{hint}{known}{' ' + note if note else ''}"
