"""What a model writes into its cache for one token at many positions, learned from a config alone.

The model is built in its real widths and run, but weighs nothing: tensors above `SMALL` numbers
are one number per row, and what a linear layer or an embedding gives is one random row, the same at
every position. Each layer ends where it hands keys and values to the cache, so that no attention,
no feed-forward and no expert runs. What is left is the model's own code between projections and
cache: norms, and whether and how it turns keys by their position.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch.overrides import TorchFunctionMode
from transformers.modeling_outputs import BaseModelOutput

from ..compat import ATTENTION, CACHE_ARGUMENTS, is_minimax, modeling

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn
    from transformers import PreTrainedConfig

POSITIONS = 64
SMALL = 1 << 16  # numbers; norms and frequencies lie below, weight matrices of real models above


class CannotProbe(Exception):
    """A model that cannot be built or run like this, and why."""


@dataclass(frozen=True)
class Probe:
    """What a model did.

    written: by layer, keys and values [1, H, T, D] of the same token at positions 0, 1, ... T - 1.
    frequencies: the rotary ones that the model holds, [R/2] each, and their `rope_type`.
    """

    written: dict[int, tuple[Tensor, Tensor]]
    frequencies: list[tuple[Tensor, str]]


def probe(config: PreTrainedConfig, layers: tuple[int, ...]) -> Probe:
    """Build and run the model of this config as far as the caches of these layers.

    Raises CannotProbe where one of them was not reached.
    """
    config = copy.deepcopy(config)
    setattr(config, ATTENTION, "eager")
    random = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
        try:
            with _Weightless():
                model = model_class(config)(config).float().eval()
        except Exception as e:
            raise CannotProbe(str(e)) from e
        _fill(model, random)
        written = _run(model, config, layers, random)
    frequencies = [
        (x, _rope_type(module, name))
        for module in model.modules()
        for name, x in module.named_buffers(recurse=False)
        if name.endswith("inv_freq") and "original" not in name and x.dim() == 1
    ]
    return Probe(written, frequencies)


def model_class(config: PreTrainedConfig) -> type[transformers.PreTrainedModel]:
    """The class of models of a config: transformers' own, else one that is loaded.

    Raises CannotProbe.
    """
    mappings = [transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_MAPPING]
    if config.is_encoder_decoder:  # its causal model would be the decoder alone
        mappings.reverse()
    for mapping in mappings:
        found = mapping.get(type(config), None)
        if found is not None:
            return found[0] if isinstance(found, (tuple, list)) else found
    with contextlib.suppress(ImportError):  # beside the config, where transformers has it
        modeling(config)
    todo = [transformers.PreTrainedModel]
    while todo:
        for cls in todo.pop().__subclasses__():
            if cls.config_class is type(config) and _cache_argument(cls) is not None:
                return cls
            todo.append(cls)
    raise CannotProbe("no model class is known for this config")


def positions_depend_on_images(config: PreTrainedConfig) -> bool:
    """Whether models of this config number tokens otherwise where images stand (M-RoPE)."""
    try:
        return hasattr(model_class(config), "get_rope_index")
    except CannotProbe:
        return False


def _cache_argument(cls: type) -> str | None:
    known = inspect.signature(cls.forward).parameters
    return next((name for name in CACHE_ARGUMENTS if name in known), None)


def _rope_type(module: nn.Module, name: str) -> str:
    """Of the frequencies in a buffer; a module with several kinds prefixes them by layer type."""
    kind = getattr(module, "rope_type", "default")
    return kind.get(name.removesuffix("_inv_freq"), "default") if isinstance(kind, dict) else kind


def _fill(model: nn.Module, random: torch.Generator) -> None:
    """Random weights: were all norms 1, it would not matter where they stand."""
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None and not weight.is_meta:
                weight.data.uniform_(0.5, 1.5, generator=random)
            elif weight is not None:
                module._parameters[name] = _one_per_row(weight, random)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = _one_per_row(buffer, random)


def _one_per_row(x: Tensor, random: torch.Generator) -> Tensor:
    rows = torch.rand(x.shape[0], *(1 for _ in x.shape[1:]), generator=random)
    return rows.to(x.dtype).expand(x.shape)  # the memory of its rows


def _run(
    model: nn.Module, config: PreTrainedConfig, layers: tuple[int, ...], random: torch.Generator
) -> dict[int, tuple[Tensor, Tensor]]:
    """What the layers wrote. Raises CannotProbe with what first went wrong."""
    blocks = [
        block
        for blocks in model.modules()
        if isinstance(blocks, torch.nn.ModuleList)
        for block in blocks
    ]
    for module in model.modules():
        if hasattr(module, "conv1d"):  # a mixer beside attention, whose state takes long
            module.forward = _input
    went_wrong: list[Exception] = []
    # most blocks return hidden states, others a tuple that begins with them
    for others in (None, 0, 1, 2):
        recorder = _Recorder(config, layers)
        for block in blocks:
            block.__dict__.pop("forward", None)
            block.forward = _until_cache(block, layers, others, went_wrong)
        try:
            with _Rows(random):
                model(**_inputs(model, config, recorder))
        except _Done:
            return recorder.written
        except Exception as e:
            went_wrong.append(e)
        else:
            silent = ", ".join(str(i) for i in layers if i not in recorder.written)
            went_wrong.append(CannotProbe(f"no keys come from layers {silent}"))
            break
    raise CannotProbe(str(went_wrong[0])) from went_wrong[0]


def _inputs(model: nn.Module, config: PreTrainedConfig, recorder: _Recorder) -> dict[str, Any]:
    """One token many times."""
    ids = torch.ones(1, POSITIONS, dtype=torch.long)
    name = _cache_argument(type(model))
    if name is None:
        raise CannotProbe(f"{type(model).__name__} takes no cache")
    if not config.is_encoder_decoder:
        # those of MiniMax look at the class of a cache only where they are told to use it
        return {"input_ids": ids, name: recorder, "use_cache": not is_minimax(config)}
    cache = transformers.EncoderDecoderCache(recorder, transformers.DynamicCache())
    encoder = getattr(config, "encoder", config)
    encoded = BaseModelOutput(last_hidden_state=torch.zeros(1, 1, encoder.hidden_size))
    encoded.attention_mask = None  # Moonshine's encoder gives one
    return {"decoder_input_ids": ids, "encoder_outputs": encoded, name: cache, "use_cache": True}


class _Written(Exception):
    """A layer has reached its cache."""


class _Done(BaseException):
    """All layers have: no block and no model may go on."""


class _Recorder(transformers.DynamicCache):
    """Takes what layers write, and ends them."""

    def __init__(self, config: PreTrainedConfig, layers: tuple[int, ...]) -> None:
        super().__init__(config=config)
        self.wanted, self.written = layers, {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any):
        """Keys and values [1, H, S, D] of a layer."""
        self.written[layer_idx] = key_states, value_states
        raise _Done if all(i in self.written for i in self.wanted) else _Written


def _until_cache(
    block: nn.Module, layers: tuple[int, ...], others: int | None, went_wrong: list[Exception]
) -> Callable:
    """The forward of a block up to its cache, which then gives its input, in a tuple with others.

    A block of other layers only, linear attention for one, does nothing.
    """
    original = block.forward
    indices = {x.layer_idx for x in block.modules() if hasattr(x, "layer_idx")}

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not indices or indices.intersection(layers):
            try:
                return original(*args, **kwargs)
            except _Written:
                pass
            except Exception as e:
                went_wrong.append(e)
        x = _input(*args, **kwargs)
        return x if others is None else (x, *[None] * others)

    return forward


def _input(*args: Any, **kwargs: Any) -> Tensor:
    """The hidden states that a module is given."""
    return args[0] if args else kwargs["hidden_states"]


class _Weightless(TorchFunctionMode):
    """Gives large new tensors no data."""

    MAKERS = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in self.MAKERS:
            outline = func(*args, **(kwargs | {"device": "meta"}))
            if outline.numel() > SMALL:
                return outline
        return func(*args, **kwargs)


class _Rows(TorchFunctionMode):
    """A linear layer or an embedding gives a random row, the same wherever the token stands."""

    def __init__(self, random: torch.Generator) -> None:
        super().__init__()
        self.random = random

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.linear:
            shape = *args[0].shape[:-1], args[1].shape[0]
        elif func is torch.addmm:  # GPT-2's way to write a linear layer
            shape = *args[1].shape[:-1], args[2].shape[1]
        elif func is torch.nn.functional.embedding:
            shape = *args[0].shape, args[1].shape[1]
        else:
            return func(*args, **(kwargs or {}))
        return torch.randn(shape[-1], generator=self.random).expand(shape).clone()
