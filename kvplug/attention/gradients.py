"""Gradients of keys and values: exact caches on the device pass them, others refuse, aloud."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import NoGradient

if TYPE_CHECKING:
    from ..spec import Strategy


def recorded(*tensors: Tensor) -> bool:
    """Whether autograd records what is done with one of them."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def refuse_training(strategy: Strategy) -> None:
    """Raise NoGradient where the module that calls is in training mode, before attention runs."""
    if _in_training():
        raise NoGradient(f"{_why(strategy)}; or end training mode (model.eval)")


def refuse(
    strategy: Strategy, new: tuple[Tensor, Tensor], stored: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """The keys and values `stored`, in a graph in which they come of `new`.

    Gradients may be recorded and never asked for, as in a forward pass of `model.eval()` without
    `torch.no_grad()`: the backward pass raises NoGradient.
    """
    why = _why(strategy)
    return Refused.apply(why, new[0], stored[0]), Refused.apply(why, new[1], stored[1])


def _why(strategy: Strategy) -> str:
    return (
        f"{str(strategy)!r} passes no gradient to keys and values: run without gradients "
        "(torch.no_grad), or with an exact cache on the device, such as 'growing'"
    )


class Refused(torch.autograd.Function):
    """What is stored, in the graph of what it was made of, up to the backward pass."""

    @staticmethod
    def forward(ctx: Any, why: str, new: Tensor, stored: Tensor) -> Tensor:
        ctx.why = why
        return stored.view_as(stored)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        return None, no_gradient(gradient, ctx.why), None


@torch.library.custom_op("kvplug::no_gradient", mutates_args=())
def no_gradient(gradient: Tensor, why: str) -> Tensor:
    """Raise NoGradient; opaque to the compiler, which traces a backward pass that may never run."""
    raise NoGradient(why)


@no_gradient.register_fake
def _(gradient: Tensor, why: str) -> Tensor:
    return torch.empty_like(gradient)


def _in_training() -> bool:
    """Whether the nearest module among the callers is in training mode: no cache is told."""
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, torch.nn.Module):
            return caller.training
        frame = frame.f_back
    return False
