"""The best other ways to compute what ivfast computes, written for PyTorch alone."""

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention


def svgd_matmul(x: Tensor, score: Tensor, h: float) -> Tensor:
    """SVGD direction of x [n, d]: K by one addmm of the centred particles, then K V."""
    x = x - x.mean(0)
    norms = x.square().sum(1)
    kernel = torch.addmm(norms[:, None] + norms, x, x.mT, beta=-1 / h, alpha=2 / h).clamp_max(0).exp()
    return (kernel @ (score - (2 / h) * x) + (2 / h) * kernel.sum(1, keepdim=True) * x) / len(x)


def svgd_cdist(x: Tensor, score: Tensor, h: float) -> Tensor:
    """SVGD direction of x [n, d] through torch.cdist."""
    kernel = torch.exp(torch.cdist(x, x).square() / -h)
    return (kernel @ (score - (2 / h) * x) + (2 / h) * kernel.sum(1, keepdim=True) * x) / len(x)


def svgd_attention(x: Tensor, score: Tensor, h: float) -> Tensor:
    """SVGD direction of x [n, d] by fused attention, which never writes K.

    Key j's logit is 2 x_i·x_j/h − ‖x_j‖²/h. One more key, of logit ‖x_i‖²/h and of value (0, 1), brings out the
    denominator: the last column is 1/(r_i + 1), and the others are (K V)_i/(r_i + 1).
    """
    x = x - x.mean(0)
    norms = x.square().sum(1, keepdim=True) / h
    query = torch.cat([(2 / h) * x, torch.ones_like(norms), norms], 1)
    key = torch.cat([pad(torch.cat([x, -norms], 1), (0, 1)), query.new_zeros(1, query.shape[1])])
    value = pad(score - (2 / h) * x, (0, 2, 0, 1))
    last = torch.zeros_like(value)
    last[-1, -1] = 1
    key = key + last
    out = scaled_dot_product_attention(query[None, None], key[None, None], (value + last)[None, None], scale=1.0)[0, 0]
    total = 1 / out[:, -1:]  # r + 1
    return (total * out[:, :-2] + (2 / h) * (total - 1) * x) / len(x)
