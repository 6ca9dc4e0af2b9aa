"""Keys and values read as they are stored: tensors in shape, dtype and device, without own data.

`Layer.update` returns a `KeyView` and a `ValueView`. The model's attention code handles them like
tensors until it calls `scaled_dot_product_attention`, where a kernel reads the encoded blocks. Head
repetition for grouped queries (`repeat_kv`, `enable_gqa`: it differs between versions of
transformers) is followed, not carried out. Anything else that reads a view materialises the dense
tensor of its side: always correct, counted in `stats()`, logged once. What a dense copy cannot do
raises ViewError: being written to, and having an address.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from ..errors import NoGradient, ViewError
from .gradients import recorded
from .joined import Joined
from .mask import causal, fit

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from ..kernels.base import Kernel
    from ..stats import Stats
    from .stored import Stored

SDPA = torch.nn.functional.scaled_dot_product_attention
# questions about a tensor that its content does not answer
PROPERTIES = (
    *("shape", "dtype", "device", "ndim", "layout", "itemsize", "nbytes", "output_nr", "name"),
    *("requires_grad", "is_leaf", "retains_grad", "grad", "grad_fn", "_version", "_base"),
    *("is_cpu", "is_cuda", "is_meta", "is_mps", "is_xpu", "is_xla", "is_mtia"),
    *("is_sparse", "is_sparse_csr", "is_quantized", "is_nested", "is_mkldnn"),
)
METHODS = (
    *("size", "dim", "ndimension", "numel", "nelement", "__len__", "element_size", "type"),
    *("stride", "storage_offset", "is_contiguous", "dim_order", "get_device"),
    *("is_floating_point", "is_complex", "is_signed", "is_inference", "is_conj", "is_neg"),
    *("is_shared", "is_distributed", "_is_view"),
)
# what gives an address, or what is asked for one; NumPy and DLPack keep alive what they are given
ADDRESSES = ("data_ptr", "const_data_ptr", "untyped_storage", "_typed_storage", "storage")


def _of_tensor(names: tuple[str, ...]) -> list[Any]:
    """Attributes of `torch.Tensor`, as far as this torch has them: 2.11 lacks some of 2.13."""
    return [getattr(torch.Tensor, name) for name in names if hasattr(torch.Tensor, name)]


METADATA = {
    *(x.__get__ for x in _of_tensor(PROPERTIES)),
    *_of_tensor(METHODS),
    *(torch.is_floating_point, torch.is_complex, torch.is_signed, torch.is_inference),
    *(torch.is_conj, torch.is_neg, torch.numel),
}
CUDA_POINTER = torch.Tensor.__cuda_array_interface__.__get__
POINTERS = {*_of_tensor(ADDRESSES), CUDA_POINTER}
OPERATORS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)
# what writes to its first argument, beside functions whose name ends with an underscore
WRITING = {
    *("__setitem__", "__set__", "__setstate__", "__iadd__", "__isub__", "__imul__", "__imatmul__"),
    *("__idiv__", "__itruediv__", "__ifloordiv__", "__imod__", "__ipow__", "__ilshift__"),
    *("__irshift__", "__iand__", "__ior__", "__ixor__"),
}


@dataclass(frozen=True)
class Watch:
    """Who is told which queries a call's keys and values met, once attention has run.

    tell: takes queries [B, Q, n, Dk], their log-sum-exp [B, Q, n] or None, and the scale
    new: tokens of the call
    queries: n, how many of the newest are wanted
    log_sum_exp: whether that of their scores is wanted too
    missed: called where keys or values are read as a dense tensor, which shows no query
    """

    tell: Callable[[Tensor, Tensor | None, float], None]
    new: int
    queries: int
    log_sum_exp: bool
    missed: Callable[[], None]

    def see(
        self,
        query: Tensor,
        lse: Tensor | None,
        kernel: Kernel,
        stored: Stored,
        mask: Tensor | None,
        scale: float | None,
        is_causal: bool,
    ) -> None:
        """Tell of one call of attention; lse: where a kernel has computed it."""
        rows, D = query.shape[2:]
        n = min(self.queries, self.new)
        packed = rows > self.new  # transformers packs head groups into the query axis
        if self.log_sum_exp and lse is None:
            last = rows if packed else n
            if is_causal:
                mask = causal(rows, stored.length, query.device)
            if mask is not None and mask.shape[-2] == rows:
                mask = mask[..., -last:, :]
            lse = kernel.attend(query[:, :, -last:], stored, mask, scale, False)[1]
        if packed:
            query = query.reshape(len(query), -1, self.new, D)
            lse = None if lse is None else lse.reshape(len(query), -1, self.new)
        wanted = lse[..., -n:] if self.log_sum_exp else None
        self.tell(query[:, :, -n:], wanted, D**-0.5 if scale is None else scale)


@dataclass(frozen=True)
class Call:
    """What the views of one `update` share; of `Joined`, each group of heads is watched itself."""

    stored: Stored | Joined
    kernel: Kernel
    stats: Stats
    watch: Watch | None = None


class View(torch.Tensor):
    """A lazy [B, H * repeats, T, D] over `Stored`; 5-dimensional in the middle of `repeat_kv`."""

    _call: Call
    stored: Stored | Joined
    _repeats: int
    _shape: torch.Size
    _side: int  # 0: keys, 1: values

    @staticmethod
    def __new__(
        cls,
        call: Call,
        repeats: int = 1,
        shape: tuple | None = None,
    ):
        stored = call.stored
        like = stored.tail[cls._side]
        if shape is None:
            shape = (like.shape[0], like.shape[1] * repeats, stored.length, like.shape[-1])
        view = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        view._call, view.stored, view._repeats = call, stored, repeats
        view._shape = torch.Size(shape)
        torch._C._set_throw_on_mutable_data_ptr(view)  # for extensions in C++: else a null pointer
        return view

    @property
    def shape(self) -> torch.Size:
        """Asked several times per call of attention: answered without `__torch_function__`."""
        return self._shape

    def materialise(self, reason: str) -> Tensor:
        """The dense tensor of this view's shape; counted under `reason` where it must be made."""
        if self.stored.own_mask:
            raise ViewError(
                f"{reason} reads the cache as a dense tensor, for which transformers' mask is not "
                "right where heads hold different numbers of tokens, or different ones of padded "
                "rows; use attn_implementation='sdpa', or equal heads and rows without padding"
            )
        if not self.stored.is_plain:
            self._call.stats.materialise(reason)
        dense = self.stored.side(self._side)
        for call in self.stored.calls if isinstance(self.stored, Joined) else (self._call,):
            if call.watch is not None:
                call.watch.missed()
        if self.dim() == 5:
            return dense[:, :, None].expand(self.shape)
        return dense if self._repeats == 1 else dense.repeat_interleave(self._repeats, dim=1)

    def _like(self, shape: tuple, repeats: int | None = None) -> View:
        return type(self)(self._call, self._repeats if repeats is None else repeats, shape)

    @classmethod
    @torch.compiler.disable  # a compiler that traces a model calls this as it stands
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in METADATA or (func == CUDA_POINTER and not args[0].is_cuda):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is SDPA and (out := _attend(*args, **kwargs)) is not None:
            return out
        if func in FOLLOWED and (view := FOLLOWED[func](*args, **kwargs)) is not None:
            return view
        if isinstance(func, OPERATORS):  # of `torch.ops`: their schema says what they write to
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        reason = getattr(func, "__name__", str(func))
        if func in POINTERS:
            raise ViewError(
                f"{reason}: what a kvplug cache returns has no memory of its own to point to; take "
                "the address of its clone() and keep that, or use numpy() or DLPack"
            )
        if _has_view(_written(reason, args, kwargs)):
            raise _lost(reason)
        args, kwargs = tree_map_only(View, lambda v: v.materialise(reason), (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Calls that come from C++ and not from Python, such as inside a fused operator."""
        kwargs = kwargs or {}
        for i, argument in enumerate(func._schema.arguments):
            given = args[i] if i < len(args) else kwargs.get(argument.name)
            if argument.is_write and _has_view(given):
                raise _lost(str(func))
        args, kwargs = tree_map_only(View, lambda v: v.materialise(str(func)), (args, kwargs))
        return func(*args, **kwargs)

    def __repr__(self) -> str:
        with torch._C.DisableTorchFunctionSubclass():
            shape = tuple(self.shape)
            return f"{type(self).__name__}({shape=}, dtype={self.dtype}, {self.stored.codec!r})"


class KeyView(View):
    """The keys of a layer."""

    _side = 0


class ValueView(View):
    """The values of a layer."""

    _side = 1


def _written(name: str, args: tuple, kwargs: dict) -> list:
    """The arguments that a function of this name writes to: `x.add_`, `x[i] = y`, `out=`."""
    written = [kwargs.get("out")]
    if kwargs.get("inplace") or name in WRITING or (name.endswith("_") and name[-2:] != "__"):
        written += args[:1] or [kwargs.get("input", kwargs.get("self"))]
    return written


def _has_view(arguments: Any) -> bool:
    return any(isinstance(x, View) for x in tree_leaves(arguments))


def _lost(name: str) -> ViewError:
    return ViewError(
        f"{name} would be lost: what a kvplug cache returns is a view of what is stored, without "
        "memory of its own; write to its clone() and use that"
    )


def views(
    stored: Stored | Joined, kernel: Kernel, stats: Stats, watch: Watch | None = None
) -> tuple[KeyView, ValueView]:
    """The keys and values of one call."""
    call = Call(stored, kernel, stats, watch)
    return KeyView(call), ValueView(call)


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
    ours = isinstance(key, KeyView) and isinstance(value, ValueView) and key.stored is value.stored
    if (
        not ours
        or isinstance(query, View)
        or dropout_p
        or query.shape[1] % key.stored.tail[0].shape[1]
    ):
        return None
    stored = key.stored
    if not isinstance(stored, Joined):
        return _read(key._call, query, attn_mask, scale, is_causal)
    heads, outs = stored.heads, []
    for group, call in enumerate(stored.calls):
        mask = attn_mask
        if mask is not None and mask.dim() == 4 and mask.shape[1] > 1:
            mask = heads.of(mask, group)
        outs.append(_read(call, heads.of(query, group), mask, scale, is_causal))
    return heads.join(outs)


def _read(
    call: Call, query: Tensor, attn_mask: Tensor | None, scale: float | None, is_causal: bool
) -> Tensor:
    """Attention of a query over what one call has stored."""
    stored, kernel, watch = call.stored, call.kernel, call.watch
    mask = fit(attn_mask, is_causal, stored, query.shape[1])
    rest = mask, scale, is_causal
    lse = None
    graph = recorded(query, *stored.tail) and not kernel.differentiable
    # tokens as they came: torch's own attention has the gradient, and is faster for many queries
    plain = stored.is_plain and not kernel.reads_plain(query.shape[2], stored.length)
    if query.is_meta:  # only shapes are asked for, and a compiled kernel would read an address
        out = query.new_empty(*query.shape[:3], stored.tail[1].shape[-1])
        lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    elif plain or (graph and not stored.block_count and stored.starts is None):
        if not stored.is_plain:
            call.stats.materialise(SDPA.__name__)
        gqa = query.shape[1] != stored.tail[0].shape[1]
        out = SDPA(query, *stored.dense(), mask, 0.0, is_causal, scale=scale, enable_gqa=gqa)
    else:
        call.stats.kernels[kernel.name] += 1
        if graph:
            out = ForwardOnly.apply(kernel, query, *stored.tail, stored, *rest)
        else:
            out, lse = kernel.attend(query, stored, *rest)
    if watch:
        watch.see(query.detach(), lse, kernel, stored, *rest)
    return out


class ForwardOnly(torch.autograd.Function):
    """A kernel's output in a graph that autograd records: right, until its gradient is wanted."""

    @staticmethod
    def forward(
        ctx: Any, kernel: Kernel, query: Tensor, keys: Tensor, values: Tensor, *rest: Any
    ) -> Tensor:
        ctx.name = kernel.name
        return kernel.attend(query, *rest)[0]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise NoGradient(
            f"kernel {ctx.name!r} has no gradient; choose 'reference', as in 'int4+reference', for "
            "that of the query, an exact cache on the device, such as 'growing', for all, or run "
            "without gradients (torch.no_grad)"
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
