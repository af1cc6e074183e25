"""What S1 and S2 say about bridges and block substitution, on fresh random inputs."""

import torch

import ivfast
from ivfast.testing import error

DOUBLE = torch.float64


def normal(*shape, dtype=DOUBLE):
    return torch.randn(*shape, dtype=dtype)


def bridges_of(z, t=4):
    return {
        "blockwise": ivfast.blockwise_bridge(z, t),
        "radial": ivfast.radial_bridge(z, t),
        "svgd": ivfast.svgd_bridge(z, t),
    }


def test_bridges_leave_the_standard_normal_unchanged():
    n, d = 2000, 16
    for name, bridge in bridges_of(normal(n, d, dtype=torch.float32)).items():
        for k, zk in enumerate(bridge):
            # FLD of n exact draws is near d²/4n + d/n = 0.04; SVGD with 0.1 noise stays within a few times that
            assert float(ivfast.fld(zk)) < 0.12, f"{name} T_{k}"


def test_bridges_begin_at_the_code_and_end_at_the_prior():
    z, other, draws = normal(30, 8), normal(30, 8), normal(30, 8)
    for f in (ivfast.blockwise_bridge, ivfast.radial_bridge):
        bridge = f(z, 4, draws=draws)
        assert torch.equal(bridge[0], z)
        assert torch.equal(bridge[-1], draws)
        assert torch.equal(f(other, 4, draws=draws)[-1], bridge[-1])
        assert bridge.is_contiguous()
    draws = normal(7, 30, 8)
    bridge = ivfast.svgd_bridge(z, 4, draws=draws)
    assert torch.equal(bridge[0], z)
    assert torch.equal(bridge[-1], draws[-1])
    x = z
    for draw in draws[:2]:
        x = x + ivfast.svgd_direction(x, scale=100.0, convention="paper") + 0.1 * draw
    assert error(bridge[1], x) < 1e-12


def test_generators_repeat_the_draws():
    z = normal(6, 4)
    for f in (ivfast.blockwise_bridge, ivfast.radial_bridge, ivfast.svgd_bridge):
        first, second = (f(z, 2, generator=torch.Generator().manual_seed(3)) for _ in range(2))
        assert torch.equal(first, second)


def test_blockwise_bridge_replaces_the_first_k_blocks():
    z, draws = torch.zeros(3, 8), torch.ones(3, 8)
    expected = torch.tensor([[0] * 8, [1, 1] + [0] * 6, [1] * 4 + [0] * 4, [1] * 6 + [0] * 2, [1] * 8])
    assert torch.equal(ivfast.blockwise_bridge(z, 4, draws=draws)[:, 0], expected.float())


def test_block_substitute_replaces_one_block_and_leaves_the_normal_unchanged():
    z, draws = torch.zeros(3, 6), torch.ones(3, 6)
    expected = [[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]]
    assert ivfast.block_substitute(z, 3, torch.arange(3), draws=draws).int().tolist() == expected
    z = normal(4000, 8)
    assert float(ivfast.fld(ivfast.block_substitute(z, 4, torch.randint(4, (4000,))))) < 0.03
