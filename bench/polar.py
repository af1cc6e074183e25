"""Polar factors of matrices [p, q], computed in float64: `ivfast bench polar`."""

import torch

import ivfast

from .harness.problem import Problem, Provider


def eager(m):
    """By singular vectors; its gradient divides by differences of squared singular values."""
    U, _, Vh = torch.linalg.svd(m.double(), full_matrices=False)
    return (U @ Vh).to(m.dtype)


PROBLEM = Problem(
    op="polar",
    axes="p×q",
    sizes=((64, 16), (128, 64), (256, 128)),
    draw=lambda size: (torch.randn(size),),
    output=lambda size: size,
    function=ivfast.polar,
    peers=(Provider("eager", eager),),
)


def test_polar(timed):
    timed()
