"""Keys and values read as they are stored: tensors in shape, dtype and device, without own data.

`Layer.update` returns a `KeyView` and a `ValueView`. The model's attention code handles them like
tensors until it calls `scaled_dot_product_attention`, where a kernel reads the encoded blocks. Head
repetition for grouped queries (`repeat_kv`, `enable_gqa`: it differs between versions of
transformers) is followed, not carried out. Anything else done to a view materialises the dense
tensor: always correct, counted in `stats()`, logged once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map_only

if TYPE_CHECKING:
    from torch import Tensor

    from .kernels.base import Kernel
    from .stats import Stats
    from .stored import Stored

SDPA = torch.nn.functional.scaled_dot_product_attention
# questions about a tensor that its content does not answer
PROPERTIES = ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "is_meta")
METHODS = ("size", "dim", "numel", "__len__", "is_floating_point", "element_size")
METADATA = {
    *(getattr(torch.Tensor, name).__get__ for name in PROPERTIES),
    *(getattr(torch.Tensor, name) for name in METHODS),
}


class View(torch.Tensor):
    """A lazy [B, H * repeats, T, D] over `Stored`; 5-dimensional in the middle of `repeat_kv`."""

    _stored: Stored
    _kernel: Kernel
    _stats: Stats
    _repeats: int
    _shape: torch.Size
    _side: int  # 0: keys, 1: values

    @staticmethod
    def __new__(
        cls,
        stored: Stored,
        kernel: Kernel,
        stats: Stats,
        repeats: int = 1,
        shape: tuple | None = None,
    ):
        like = stored.tail[cls._side]
        if shape is None:
            shape = (like.shape[0], like.shape[1] * repeats, stored.length, like.shape[-1])
        view = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        view._stored, view._kernel, view._stats, view._repeats = stored, kernel, stats, repeats
        view._shape = torch.Size(shape)
        return view

    @property
    def shape(self) -> torch.Size:
        """Asked several times per call of attention: answered without `__torch_function__`."""
        return self._shape

    def materialise(self, reason: str) -> Tensor:
        """The dense tensor of this view's shape; counted under `reason` where it must be made."""
        if not self._stored.is_plain:
            self._stats.materialise(reason)
        dense = self._stored.dense()[self._side]
        if self.dim() == 5:
            return dense[:, :, None].expand(self.shape)
        return dense if self._repeats == 1 else dense.repeat_interleave(self._repeats, dim=1)

    def _like(self, shape: tuple, repeats: int | None = None) -> View:
        return type(self)(
            self._stored,
            self._kernel,
            self._stats,
            self._repeats if repeats is None else repeats,
            shape,
        )

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is SDPA and (out := _attend(*args, **kwargs)) is not None:
            return out
        if func in FOLLOWED and (view := FOLLOWED[func](*args, **kwargs)) is not None:
            return view
        reason = getattr(func, "__name__", str(func))
        args, kwargs = tree_map_only(View, lambda v: v.materialise(reason), (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Calls that come from C++ and not from Python, such as inside a fused operator."""
        args, kwargs = tree_map_only(View, lambda v: v.materialise(str(func)), (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self) -> str:
        with torch._C.DisableTorchFunctionSubclass():
            shape = tuple(self.shape)
            return f"{type(self).__name__}({shape=}, dtype={self.dtype}, {self._stored.codec!r})"


class KeyView(View):
    """The keys of a layer."""

    _side = 0


class ValueView(View):
    """The values of a layer."""

    _side = 1


def views(stored: Stored, kernel: Kernel, stats: Stats) -> tuple[KeyView, ValueView]:
    """The keys and values of one call."""
    return KeyView(stored, kernel, stats), ValueView(stored, kernel, stats)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """`scaled_dot_product_attention` by the kernel; None where these are not one call's views."""
    ours = (
        isinstance(key, KeyView) and isinstance(value, ValueView) and key._stored is value._stored
    )
    if (
        not ours
        or isinstance(query, View)
        or dropout_p
        or query.shape[1] % key._stored.tail[0].shape[1]
    ):
        return None
    kernel, arguments = key._kernel, (query, key._stored, attn_mask, scale, is_causal)
    key._stats.kernels[kernel.name] += 1
    if query.requires_grad and torch.is_grad_enabled() and not kernel.differentiable:
        return ForwardOnly.apply(kernel, *arguments)
    return kernel.attend(*arguments)[0]


class ForwardOnly(torch.autograd.Function):
    """A kernel's output in a graph that autograd records: right, until its gradient is wanted."""

    @staticmethod
    def forward(ctx: Any, kernel: Kernel, *arguments: Any) -> Tensor:
        ctx.name = kernel.name
        return kernel.attend(*arguments)[0]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(
            f"kernel {ctx.name!r} has no gradient; choose 'reference', as in 'int4+reference'"
        )


def _getitem(view: View, index: Any) -> View | None:
    """`x[:, :, None, :, :]`, the first step of `repeat_kv`."""
    if view.dim() == 4 and isinstance(index, tuple) and index[2:3] == (None,):
        rest = index[:2] + index[3:]
        if len(rest) <= 4 and all(i == slice(None) for i in rest):
            B, H, T, D = view.shape
            return view._like((B, H, 1, T, D))
    return None


def _expand(view: View, *sizes: Any) -> View | None:
    """`.expand(B, H, n, T, D)`, the second."""
    sizes = tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
    if view.dim() == 5 and len(sizes) == 5 and view._repeats == 1:
        B, H, _, T, D = view.shape
        if (
            all(s in (-1, x) for s, x in zip((*sizes[:2], *sizes[3:]), (B, H, T, D), strict=True))
            and sizes[2] > 0
        ):
            return view._like((B, H, sizes[2], T, D))
    return None


def _reshape(view: View, *sizes: Any) -> View | None:
    """`.reshape(B, H * n, T, D)`, the third."""
    sizes = tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
    if view.dim() == 5:
        B, H, n, T, D = view.shape
        if sizes == (B, H * n, T, D):
            return view._like(sizes, repeats=n)
    return None


def _contiguous(view: View, **_: Any) -> View:
    return view


FOLLOWED = {
    torch.Tensor.__getitem__: _getitem,
    torch.Tensor.expand: _expand,
    torch.Tensor.reshape: _reshape,
    torch.Tensor.contiguous: _contiguous,
}
