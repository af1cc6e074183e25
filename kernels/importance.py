"""The importance-weighted generator loss in Triton: one program per set, which reads its logits two or three times,
once from memory and then from the cache.

L = Σ_i w_i log(1 + e^−l_i),  w = softmax(l) held constant.
"""

import torch
import triton
import triton.language as tl

from .card import on
from .math import softplus

BLOCK = 1024  # logits at once; chosen by register count (tests/test_cubins.py), not yet timed
# fusion is explicit, because its default differs between Triton versions
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}


@triton.jit
def _maximum(p_logits, n, dtype: tl.constexpr, BLOCK: tl.constexpr):
    b_max = tl.full([BLOCK], float("-inf"), dtype)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        b_max = tl.maximum(b_max, tl.load(p_logits + i, mask=i < n, other=float("-inf")).to(dtype))
    return tl.max(b_max, 0)


@triton.jit
def _forward_kernel(p_logits, p_loss, n, BLOCK: tl.constexpr):
    dtype = p_loss.dtype.element_ty  # dtype of the arithmetic
    i_set = tl.program_id(0).to(tl.int64)
    p_set = p_logits + i_set * n

    most = _maximum(p_set, n, dtype, BLOCK)
    b_sum, b_loss = tl.zeros([BLOCK], dtype), tl.zeros([BLOCK], dtype)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        b_l = tl.load(p_set + i, mask=i < n, other=float("-inf")).to(dtype)
        b_w = tl.exp(b_l - most)
        b_sum += b_w
        b_loss += tl.where(i < n, b_w * softplus(-b_l), 0.0)

    tl.store(p_loss + i_set, tl.sum(b_loss, 0) / tl.sum(b_sum, 0))


@triton.jit
def _backward_kernel(p_grad, p_logits, p_dlogits, n, BLOCK: tl.constexpr):
    dtype: tl.constexpr = tl.float64 if p_logits.dtype.element_ty == tl.float64 else tl.float32
    i_set = tl.program_id(0).to(tl.int64)
    p_set = p_logits + i_set * n

    most = _maximum(p_set, n, dtype, BLOCK)
    b_sum = tl.zeros([BLOCK], dtype)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        b_sum += tl.exp(tl.load(p_set + i, mask=i < n, other=float("-inf")).to(dtype) - most)
    scale = -tl.load(p_grad + i_set).to(dtype) / tl.sum(b_sum, 0)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        b_l = tl.load(p_set + i, mask=i < n, other=0.0).to(dtype)
        # ∂l_i = −w_i σ(−l_i)
        b_dl = scale * tl.exp(b_l - most) / (1 + tl.exp(b_l))
        tl.store(p_dlogits + i_set * n + i, b_dl, mask=i < n)


def forward(logits):
    """The loss `[...]` of logits `[..., n]`."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    loss = torch.empty(logits.shape[:-1], dtype=dtype, device=logits.device)
    if sets := loss.numel():
        _forward_kernel[sets,](logits.contiguous(), loss, logits.shape[-1], BLOCK, **on(logits, OPTIONS))
    return loss


def backward(grad, logits):
    """∂L/∂logits, given grad = ∂L/∂loss `[...]`."""
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if sets := grad.numel():
        _backward_kernel[sets,](
            grad.contiguous(), logits.contiguous(), dlogits, logits.shape[-1], BLOCK, **on(logits, OPTIONS)
        )
    return dlogits
