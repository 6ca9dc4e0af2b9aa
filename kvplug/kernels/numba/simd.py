"""Vectors of floats for Numba, which has none of its own: one value of `LANES` float32.

LLVM vectorises plain loops when it thinks it pays, and a small change of a loop makes it ten times
slower. The kernels say it themselves. Each operation is a Python function, where a vector is a
NumPy array: that is its specification, and what runs under NUMBA_DISABLE_JIT=1. The `compiled`
function after it writes the LLVM instruction that takes its place. Memory is read and written by
address: one compiled kernel serves every shape, stride and dtype.
"""

from __future__ import annotations

import ctypes
import inspect
from typing import TYPE_CHECKING, Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types
from numba.core.cgutils import get_or_insert_function
from numba.core.typing import signature
from numba.extending import lower_builtin, models, register_model, type_callable

if TYPE_CHECKING:
    from collections.abc import Callable

# a register of AVX-512; elsewhere of AVX, which LLVM makes two of NEON's
LANES = 16 if llvm.get_host_cpu_features().get("avx512f") else 8

I8, I16, I32 = ir.IntType(8), ir.IntType(16), ir.IntType(32)
F32 = ir.FloatType()
FLOATS = f"v{LANES}f32"  # in the names of LLVM's functions


class VectorType(types.Type):
    """Numba's type of `LANES` float32."""

    def __init__(self) -> None:
        super().__init__(name=f"float32x{LANES}")


VECTOR = VectorType()
INT, FLOAT = types.intp, types.float32


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _floats())


def operation(returns: Any, *arguments: Any) -> Callable:
    """Declare a function that compiled code replaces by LLVM of the same meaning."""

    def decorate(function: Callable) -> Callable:
        def typer(*_: Any) -> Any:
            return signature(returns, *arguments)

        typer.__signature__ = inspect.signature(function)
        type_callable(function)(lambda context: typer)

        def compiled(emit: Callable) -> Callable:
            lower_builtin(function, *arguments)(lambda _, builder, __, args: emit(builder, *args))
            return emit

        function.compiled = compiled
        return function

    return decorate


# --- memory


@operation(VECTOR, INT, INT)
def load(address, i):
    """The float32 numbers i and on of the array at `address`."""
    return _array(ctypes.c_float, address, i, LANES).copy()


@load.compiled
def _(ll, address, i):
    return ll.load(_pointer(ll, _floats(), address, i, 4), align=4)


@operation(types.void, INT, INT, VECTOR)
def store(address, i, vector):
    """Write to the float32 numbers i and on of the array at `address`."""
    _array(ctypes.c_float, address, i, LANES)[:] = vector


@store.compiled
def _(ll, address, i, vector):
    ll.store(vector, _pointer(ll, vector.type, address, i, 4), align=4)


@operation(types.void, INT, INT, FLOAT)
def put(address, i, x):
    """Write float32 number i at `address`."""
    _array(ctypes.c_float, address, i, 1)[0] = x


@put.compiled
def _(ll, address, i, x):
    ll.store(x, _pointer(ll, F32, address, i, 4))


@operation(VECTOR, INT, INT, INT, INT)
def load_codes(address, i, shift, keep):
    """`(byte >> shift) & keep` of the bytes i and on at `address`, as floats."""
    return ((_array(ctypes.c_uint8, address, i, LANES) >> shift) & keep).astype(np.float32)


@load_codes.compiled
def _(ll, address, i, shift, keep):
    codes = ll.load(_pointer(ll, ir.VectorType(I8, LANES), address, i, 1), align=1)
    codes = ll.zext(codes, ir.VectorType(I32, LANES))
    codes = ll.lshr(codes, _spread(ll, ll.trunc(shift, I32)))
    codes = ll.and_(codes, _spread(ll, ll.trunc(keep, I32)))
    return ll.uitofp(codes, _floats())


@operation(VECTOR, INT, INT)
def load_bits(address, i):
    """The bits i and on at `address`, the lowest of a byte first, as floats; i: whole vectors."""
    found = _array(ctypes.c_uint8, address, i // 8, LANES // 8)
    return np.unpackbits(found, bitorder="little").astype(np.float32)


@load_bits.compiled
def _(ll, address, i):
    where = ll.add(address, ll.lshr(i, i.type(3)))
    bits = ll.load(ll.inttoptr(where, ir.IntType(LANES).as_pointer()), align=1)
    return ll.uitofp(ll.bitcast(bits, ir.VectorType(ir.IntType(1), LANES)), _floats())


@operation(INT, INT, INT)
def byte_at(address, i):
    """Byte i at `address`."""
    return int(_array(ctypes.c_uint8, address, i, 1)[0])


@byte_at.compiled
def _(ll, address, i):
    return ll.zext(ll.load(_pointer(ll, I8, address, i, 1)), address.type)


@operation(FLOAT, INT, INT)
def float_at(address, i):
    """Float32 number i at `address`."""
    return _array(ctypes.c_float, address, i, 1)[0]


@float_at.compiled
def _(ll, address, i):
    return ll.load(_pointer(ll, F32, address, i, 4))


@operation(FLOAT, INT, INT)
def half_at(address, i):
    """Float16 number i at `address`."""
    return _array(ctypes.c_uint16, address, i, 1).view(np.float16).astype(np.float32)[0]


@half_at.compiled
def _(ll, address, i):
    return ll.fpext(ll.load(_pointer(ll, ir.HalfType(), address, i, 2)), F32)


@operation(FLOAT, INT, INT)
def bfloat_at(address, i):
    """Bfloat16 number i at `address`: the upper half of a float32."""
    return (_array(ctypes.c_uint16, address, i, 1).astype(np.uint32) << 16).view(np.float32)[0]


@bfloat_at.compiled
def _(ll, address, i):
    upper = ll.zext(ll.load(_pointer(ll, I16, address, i, 2)), I32)
    return ll.bitcast(ll.shl(upper, I32(16)), F32)


@operation(INT, FLOAT)
def to_half(x):
    """The bits of the float16 nearest to x."""
    with np.errstate(over="ignore"):
        return int(np.float16(x).view(np.uint16))


@to_half.compiled
def _(ll, x):
    return ll.zext(ll.bitcast(ll.fptrunc(x, ir.HalfType()), I16), ir.IntType(INT.bitwidth))


@operation(FLOAT, INT)
def from_half(bits):
    """The float16 of these bits."""
    return np.uint16(bits).view(np.float16).astype(np.float32)


@from_half.compiled
def _(ll, bits):
    return ll.fpext(ll.bitcast(ll.trunc(bits, I16), ir.HalfType()), F32)


@operation(VECTOR, INT, INT)
def load_halves(address, i):
    """The float16 numbers i and on of the array at `address`."""
    return _array(ctypes.c_uint16, address, i, LANES).view(np.float16).astype(np.float32)


@load_halves.compiled
def _(ll, address, i):
    halves = ir.VectorType(ir.HalfType(), LANES)
    return ll.fpext(ll.load(_pointer(ll, halves, address, i, 2), align=2), _floats())


@operation(VECTOR, INT, INT)
def load_bfloats(address, i):
    """The bfloat16 numbers i and on of the array at `address`."""
    return (_array(ctypes.c_uint16, address, i, LANES).astype(np.uint32) << 16).view(np.float32)


@load_bfloats.compiled
def _(ll, address, i):
    upper = ll.load(_pointer(ll, ir.VectorType(I16, LANES), address, i, 2), align=2)
    upper = ll.zext(upper, ir.VectorType(I32, LANES))
    return ll.bitcast(ll.shl(upper, _spread(ll, I32(16))), _floats())


@operation(types.void, INT, INT, INT, INT)
def transpose(address, step, out, out_step):
    """Write a square of `LANES` x `LANES` floats, rows `step` floats apart, turned to `out`."""
    rows = [_array(ctypes.c_float, address, i * step, LANES).copy() for i in range(LANES)]
    for i, column in enumerate(zip(*rows, strict=True)):
        _array(ctypes.c_float, out, i * out_step, LANES)[:] = column


@transpose.compiled
def _(ll, address, step, out, out_step):
    def at(start, i, step):
        return _pointer(ll, _floats(), start, ll.mul(step, step.type(i)), 4)

    def mix(x, y, first):
        lanes = [lane for i in range(first, first + LANES // 2) for lane in (i, i + LANES)]
        return ll.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, LANES), lanes))

    rows = [ll.load(at(address, i, step), align=4) for i in range(LANES)]
    half = LANES // 2
    for _ in range(LANES.bit_length() - 1):  # perfect shuffles
        pairs = list(zip(rows[:half], rows[half:], strict=True))
        rows = [mix(x, y, first) for x, y in pairs for first in (0, half)]
    for i, row in enumerate(rows):
        ll.store(row, at(out, i, out_step), align=4)


@operation(types.void, INT)
def prefetch(address):
    """Have the cache line at `address` fetched, if it exists."""


@prefetch.compiled
def _(ll, address):
    where = ll.inttoptr(address, I8.as_pointer())
    # to read, for long, as data
    _call(ll, "llvm.prefetch.p0", ir.VoidType(), where, I32(0), I32(3), I32(1))


# --- arithmetic


@operation(VECTOR, FLOAT)
def spread(x):
    """`x` in every lane."""
    return np.full(LANES, x, dtype=np.float32)


@spread.compiled
def _(ll, x):
    return _spread(ll, x)


@operation(VECTOR, VECTOR, VECTOR, VECTOR)
def multiply_add(x, y, z):
    """`x * y + z`, rounded once when compiled."""
    with np.errstate(all="ignore"):  # columns that are hidden later may hold anything
        return x * y + z


@multiply_add.compiled
def _(ll, x, y, z):
    return _call(ll, f"llvm.fma.{FLOATS}", x.type, x, y, z)


@operation(VECTOR, VECTOR, VECTOR)
def larger(x, y):
    """The larger one, lane by lane; `y` where one is NaN."""
    return np.where(x > y, x, y)


@larger.compiled
def _(ll, x, y):
    return ll.select(ll.fcmp_ordered(">", x, y), x, y)


@operation(FLOAT, VECTOR)
def largest(x):
    """The largest lane; any, where one is NaN."""
    return x.max()


@largest.compiled
def _(ll, x):
    # not llvm.vector.reduce.fmax, which looks for NaN at every step: three times the instructions
    for half in (LANES >> i for i in range(1, LANES.bit_length())):
        lanes = [(i + half) % LANES for i in range(LANES)]
        y = ll.shuffle_vector(x, x, ir.Constant(ir.VectorType(I32, LANES), lanes))
        x = ll.select(ll.fcmp_ordered(">", x, y), x, y)
    return ll.extract_element(x, I32(0))


@operation(FLOAT, VECTOR)
def total(x):
    """The sum of all lanes, in any order."""
    return x.sum(dtype=np.float32)


@total.compiled
def _(ll, x):
    name = f"llvm.vector.reduce.fadd.{FLOATS}"
    return _call(ll, name, F32, F32(-0.0), x, fastmath=("reassoc",))


@operation(VECTOR, VECTOR, VECTOR, VECTOR)
def where_positive(condition, x, y):
    """`x` where `condition > 0`, else `y`."""
    return np.where(condition > 0, x, y)


@where_positive.compiled
def _(ll, condition, x, y):
    return ll.select(ll.fcmp_ordered(">", condition, _spread(ll, F32(0.0))), x, y)


# 2**f on [-1/2, 1/2]: minimax of degree 5, exact at 0, relative error 9.1e-8
EXP2 = (1.32647271e-3, 9.67151264e-3, 5.55073374e-2, 0.240222421, 0.693146978, 1.0)
ROUND = 1.5 * 2**23  # a float32 of this size has no bits below one: the sum is rounded


@operation(VECTOR, VECTOR)
def exp2(x):
    """`2 ** x` for x <= 0; zero where that is below float32's normal numbers."""
    whole = np.rint(np.maximum(x, np.float32(-126)))
    part = np.maximum(x, np.float32(-126)) - whole
    power = np.float32(EXP2[0])
    for c in EXP2[1:]:
        power = power * part + np.float32(c)
    with np.errstate(invalid="ignore"):  # NaN stays NaN through `power`
        shifted = power * ((whole.astype(np.int32) + 127) << 23).view(np.float32)
    return np.where(x < -126, np.float32(0), shifted)


@exp2.compiled
def _(ll, x):
    lowest, magic = _spread(ll, F32(-126.0)), _spread(ll, F32(ROUND))
    under = ll.fcmp_ordered("<", x, lowest)
    x = ll.select(under, lowest, x)  # not maxnum: NaN must stay
    rounded = ll.fadd(x, magic)  # whose low bits are the whole number
    part, power = ll.fsub(x, ll.fsub(rounded, magic)), _spread(ll, F32(EXP2[0]))
    for c in EXP2[1:]:
        power = _call(ll, f"llvm.fma.{FLOATS}", x.type, power, part, _spread(ll, F32(c)))
    biased = ll.add(ll.bitcast(rounded, ir.VectorType(I32, LANES)), _spread(ll, I32(127)))
    exponent = ll.bitcast(ll.shl(biased, _spread(ll, I32(23))), x.type)
    return ll.select(under, _spread(ll, F32(0.0)), ll.fmul(power, exponent))


def _floats() -> ir.VectorType:
    return ir.VectorType(F32, LANES)


def _array(kind: type, address: int, i: int, n: int) -> np.ndarray:
    return np.ctypeslib.as_array((kind * n).from_address(address + i * ctypes.sizeof(kind)))


def _pointer(ll: Any, kind: Any, address: Any, i: Any, size: int) -> Any:
    return ll.inttoptr(ll.add(address, ll.mul(i, i.type(size))), kind.as_pointer())


def _spread(ll: Any, x: Any) -> Any:
    nothing = ir.Constant(ir.VectorType(x.type, LANES), ir.Undefined)
    first = ir.Constant(ir.VectorType(I32, LANES), [I32(0)] * LANES)
    return ll.shuffle_vector(ll.insert_element(nothing, x, I32(0)), nothing, first)


def _call(ll: Any, name: str, returns: Any, *args: Any, fastmath: tuple[str, ...] = ()) -> Any:
    kind = ir.FunctionType(returns, [x.type for x in args])
    return ll.call(get_or_insert_function(ll.module, kind, name), args, fastmath=fastmath)
