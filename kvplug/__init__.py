"""Pluggable KV caches for Hugging Face transformers, chosen by name in any `generate` call."""

from importlib.metadata import PackageNotFoundError, version

from . import launch
from .cache import Cache
from .calibrate import calibrate
from .choose import Choice, recommend
from .codecs.base import Codec, Encoded
from .errors import (
    CacheOverflow,
    Evicted,
    KvplugError,
    Mismatch,
    MissingExtra,
    NoGradient,
    NoRoom,
    SpecError,
    StoreError,
    UnknownHost,
    UnknownStage,
    Unseen,
    ViewError,
)
from .estimate import estimate
from .factory import build, load
from .hook import register, unregister
from .kernels.base import Kernel
from .layers.base import AttentionLayer, Slot
from .layers.growing import Layer
from .layers.layout import Layout
from .placement.base import Place, Placement
from .registry import add, available
from .retention.base import Candidates, Retention, Scored
from .spec import Strategy, parse
from .stage import option
from .store import Store

try:
    __version__ = version("kvplug")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "AttentionLayer",
    "Cache",
    "CacheOverflow",
    "Candidates",
    "Choice",
    "Codec",
    "Encoded",
    "Evicted",
    "Kernel",
    "KvplugError",
    "Layer",
    "Layout",
    "Mismatch",
    "MissingExtra",
    "NoGradient",
    "NoRoom",
    "Place",
    "Placement",
    "Retention",
    "Scored",
    "Slot",
    "SpecError",
    "Store",
    "StoreError",
    "Strategy",
    "UnknownHost",
    "UnknownStage",
    "Unseen",
    "ViewError",
    "add",
    "available",
    "build",
    "calibrate",
    "estimate",
    "load",
    "option",
    "parse",
    "recommend",
    "register",
    "unregister",
]

register()
launch.start()  # below `kvplug run` only: a default for calls that name no cache
