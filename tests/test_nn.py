"""Modules compute the same as their functions."""

import torch

import ivfast

DOUBLE = torch.float64


def normal(*shape, dtype=DOUBLE):
    return torch.randn(*shape, dtype=dtype)


def test_modules_are_their_functions():
    x, y = normal(9, 4), normal(8, 4)
    assert torch.equal(
        ivfast.nn.MMDLoss(kernel="rbf", bandwidth=2.0)(x, y), ivfast.mmd(x, y, kernel="rbf", bandwidth=2.0)
    )
    logits, weights = normal(6, 3), torch.tensor([0.2, 0.3, 0.5], dtype=DOUBLE)
    assert torch.equal(ivfast.nn.MultiJSLoss(weights)(logits), ivfast.multi_js_loss(logits, weights=weights))
    q = [normal(5, 3) for _ in range(4)]
    assert torch.equal(ivfast.nn.ASDistance(log=True)(*q), ivfast.as_distance(*q, log=True))
    assert "weights" in dict(ivfast.nn.MultiJSLoss(weights).named_buffers())
