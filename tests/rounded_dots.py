"""Products in Triton's interpreter, rounded as an NVIDIA GPU rounds them.

The interpreter multiplies in NumPy whatever `input_precision` says. Here a product is what Triton 3.6 to 3.9 compile for
sm_80, sm_90 and sm_100 alike (tests/test_rounded_dots.py checks that they do):

  tf32    no conversion: tensor cores ignore the lower 13 bits of a float32 operand.
  tf32x3  big = cvt.rna.tf32.f32(x), small = x − big, whose lower bits are ignored as well; small·big + big·small, 0
          where that is NaN, then big·big on top. The product is summed from 0, and c is added in float32.
  bf16x3  the same with bfloat16, rounded to nearest even, for big and small.
  ieee    fused multiply-adds in float32, left to the interpreter, like float64.

bfloat16 and float16 operands are exact. A tensor core multiplies exactly and adds eight products (sixteen of half
precision) and the accumulator at a time; the sum is cut, not rounded, to float32. That is modelled. Not modelled: before
they are added, terms are aligned to the largest one and cut one bit (A100) or two or three (Hopper, Blackwell) below a
float32's last, and an sm_80 instruction of eight products may do them four by four.
"""

import collections
import contextlib
import dataclasses

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter

DEPTH = 8  # products of float32 operands that one instruction sums; twice as many of half precision
NAMES = {getattr(ir.INPUT_PRECISION, name): name.lower() for name in ("IEEE", "TF32", "TF32x3", "BF16x3")}


def cut_to_tf32(x: np.ndarray) -> np.ndarray:
    """The operand that a tensor core reads; a NaN stays one."""
    bits = x.view(np.uint32)
    return np.where(np.isnan(x), bits, bits & np.uint32(0xFFFFE000)).view(np.float32)


def nearest_tf32(x: np.ndarray) -> np.ndarray:
    """cvt.rna.tf32.f32: ties go away from zero."""
    bits = x.view(np.uint32)
    return np.where(np.isfinite(x), (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000), bits).view(np.float32)


def nearest_bf16(x: np.ndarray) -> np.ndarray:
    bits = x.view(np.uint32)
    even = (bits >> np.uint32(16)) & np.uint32(1)
    return np.where(np.isfinite(x), (bits + np.uint32(0x7FFF) + even) & np.uint32(0xFFFF0000), bits).view(np.float32)


def cut_to_float32(x: np.ndarray) -> np.ndarray:
    """float64 rounded towards zero; what overflows is infinite."""
    nearest = x.astype(np.float32)
    beyond = (np.abs(nearest) > np.abs(x)) & np.isfinite(nearest)
    return (nearest.view(np.uint32) - beyond.astype(np.uint32)).view(np.float32)


def accumulate(a: np.ndarray, b: np.ndarray, c: np.ndarray, depth: int = DEPTH) -> np.ndarray:
    """c + a b of operands that a tensor core reads as they are."""
    terms = a.shape[-1] + -a.shape[-1] % depth
    a = np.pad(a, ((0, 0), (0, terms - a.shape[-1]))).astype(np.float64)
    b = np.pad(b, ((0, terms - b.shape[-2]), (0, 0))).astype(np.float64)
    # [steps, M, depth] times [steps, depth, N]
    sums = a.reshape(len(a), -1, depth).swapaxes(0, 1) @ b.reshape(-1, depth, b.shape[-1])
    for step in sums:
        c = cut_to_float32(c + step)
    return c


def in_three(a: np.ndarray, b: np.ndarray, c: np.ndarray, nearest, read, depth: int) -> np.ndarray:
    a_big, b_big = nearest(a), nearest(b)
    a_small, b_small = read(a - a_big), read(b - b_big)
    product = accumulate(a_small, b_big, np.zeros_like(c), depth)
    product = accumulate(a_big, b_small, product, depth)
    product = np.where(np.isnan(product), np.float32(0), product)
    return accumulate(a_big, b_big, product, depth) + c


def multiply(a: np.ndarray, b: np.ndarray, c: np.ndarray, precision: str) -> np.ndarray:
    """c + a b for float32 a `[M, K]`, b `[K, N]` and c `[M, N]`."""
    if precision == "tf32":
        return accumulate(cut_to_tf32(a), cut_to_tf32(b), c)
    if precision == "tf32x3":
        return in_three(a, b, c, nearest_tf32, cut_to_tf32, DEPTH)
    if precision == "bf16x3":
        return in_three(a, b, c, nearest_bf16, nearest_bf16, 2 * DEPTH)
    raise NotImplementedError(f"a product in {precision}")


def _float32(operand) -> np.ndarray:
    if operand.dtype.scalar == tl.bfloat16:  # the interpreter keeps its bits
        return (operand.data.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return operand.data.astype(np.float32)


@contextlib.contextmanager
def rounded():
    """Inside, interpreted products are rounded. Yields how many there were by precision, or by the operands' type if that
    is not float32, and under "cut" how many in TF32 had operands of more bits than a tensor core reads."""
    counts: collections.Counter[str] = collections.Counter()
    builder, exact = interpreter.InterpreterBuilder, interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        dtype, precision = a.dtype.scalar, NAMES.get(input_precision)
        of_float32 = dtype == tl.float32
        counts[precision if of_float32 else str(dtype)] += 1
        if dtype not in (tl.float32, tl.bfloat16, tl.float16) or (of_float32 and precision == "ieee"):
            return exact(self, a, b, d, input_precision, max_num_imprecise_acc)
        if d.dtype.scalar != tl.float32:
            raise NotImplementedError(f"products of {dtype} summed in {d.dtype.scalar}")
        if of_float32 and precision == "tf32":
            counts["cut"] += any((cut_to_tf32(x.data) != x.data)[np.isfinite(x.data)].any() for x in (a, b))
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            if of_float32:
                c = multiply(a.data, b.data, d.data, precision)
            else:
                c = accumulate(_float32(a), _float32(b), d.data, 2 * DEPTH)
        return interpreter.TensorHandle(c, d.dtype.scalar)

    usual = interpreter.interpreter_builder.options
    others = (*usual.allowed_dot_input_precisions, "bf16x3")
    builder.create_dot = create_dot
    interpreter.interpreter_builder.options = dataclasses.replace(usual, allowed_dot_input_precisions=others)
    try:
        yield counts
    finally:
        builder.create_dot = exact
        interpreter.interpreter_builder.options = usual
