"""References in float64, which serve on a GPU, hold pairs and dimensions in blocks of bounded size."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ivfast
from ivfast.ops import as_distance


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that an operator returns."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for x in tree_leaves(found):
            if isinstance(x, torch.Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return found


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("measure", ["lebesgue", "prior"])
@pytest.mark.parametrize("kernel", ["product", "additive"])
def test_blocks_have_the_values_and_gradients_of_the_whole(kernel, measure, unbiased, monkeypatch):
    n, m, d = 53, 31, 40
    codes = [torch.randn(n, d), torch.randn(n, d), torch.randn(m, d), torch.randn(m, d)]
    codes = [x.double().requires_grad_() for x in codes]

    def everything():
        with ivfast.use("reference"), Largest() as largest:
            value = ivfast.as_distance(*codes, kernel=kernel, measure=measure, log=True, unbiased=unbiased)
            return value, torch.autograd.grad(value, codes), largest.bytes

    whole, slopes, size = everything()
    assert size >= n * n * d * 8
    bound = 4 * n * d * 8  # four rows
    monkeypatch.setattr(as_distance, "BLOCK", bound)
    value, gradients, size = everything()
    assert size <= max(bound, n * n * 8)
    torch.testing.assert_close(value, whole, rtol=1e-13, atol=1e-13)
    for ours, theirs in zip(gradients, slopes, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-14)

    def curvature():
        with ivfast.use("reference"):
            value = ivfast.as_distance(*codes, kernel=kernel, measure=measure, log=True, unbiased=unbiased)
            (slope,) = torch.autograd.grad(value, codes[0], create_graph=True)
            return torch.autograd.grad(slope.square().sum(), codes)

    blocks = curvature()
    monkeypatch.undo()
    for ours, theirs in zip(blocks, curvature(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)
