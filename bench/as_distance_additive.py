"""AS-Distance of two batches of posteriors, additive kernel: `ivfast bench as_distance_additive`."""

import dataclasses

import ivfast

from . import as_distance
from .harness import peers
from .harness.problem import Provider

PROBLEM = dataclasses.replace(
    as_distance.PROBLEM,
    op="as_distance additive",
    long_sizes=((512, 256),),
    tolerance=1e-3,  # the logarithm of a ratio of means that nearly agree
    function=lambda *posteriors: ivfast.as_distance(*posteriors, kernel="additive", log=True),
    peers=(
        Provider("eager", peers.as_distance_additive, cubes=(6, 16)),
        Provider("compile", peers.compiled(peers.as_distance_additive), squares=(6, 6), cubes=(1, 3), compiles=True),
    ),
)


def test_as_distance_additive(timed):
    timed()
