"""S1's (IVAAE's) blockwise bridge with t = 4 and given draws: `ivfast bench bridge_blockwise`."""

import torch

import ivfast

from .bridge import T, problem


def eager(z, draws):
    width = z.shape[-1] // T
    return torch.stack([torch.cat([draws[:, : k * width], z[:, k * width :]], 1) for k in range(T + 1)])


PROBLEM = problem("blockwise_bridge", lambda z, draws: ivfast.blockwise_bridge(z, T, draws=draws), eager)


def test_bridge_blockwise(timed):
    timed()
