"""The C++ SVGD bridge beyond the case table: an independent loop, both paths, instruction sets, threads."""

import math

import pytest
import torch

import ivfast
from ivfast import testing
from ivfast.testing import Case

pytest.importorskip("ivfast._C")

SMALL = 128  # the most particles that take the path of small sets


def bridge_case(shape, t=4, iterations=2, offset=0.5, slack=1.0, **numbers):
    def draw(generator):
        z = torch.randn(shape, generator=generator, dtype=torch.float64) * 1.5 + offset
        draws = ((t - 1) * iterations + 1, *shape)
        return z, torch.randn(draws, generator=generator, dtype=torch.float64)

    def function(z, draws):
        return ivfast.svgd_bridge(z, t, iterations=iterations, draws=draws, **numbers)

    return Case("svgd_bridge", f"{tuple(shape)}", function, draw, constants=1, slack=slack)


def loop(z, draws, t, iterations=2, step_size=1.0, scale=100.0, noise=0.1):
    """As S1 writes it: distances by subtraction, the median by sorting, no gradient through it."""
    n = len(z)
    x, bridges = z, [z]
    for step in range((t - 1) * iterations):
        d2 = (x[:, None] - x).square().sum(-1)
        i, j = torch.triu_indices(n, n, 1)
        ordered = d2.detach()[i, j].sqrt().sort().values
        median = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
        h = scale * median**2 / math.log(n)
        kernel = torch.exp(-d2 / h)
        repulsion = 2 / h * (kernel[..., None] * (x[:, None] - x)).sum(1)
        x = x + step_size * (kernel @ -x + repulsion) / n + noise * draws[step]
        if (step + 1) % iterations == 0:
            bridges.append(x)
    return torch.stack([*bridges, draws[-1]])


@pytest.mark.parametrize("n", [2, 3, 40, 64, 65, SMALL, SMALL + 1])
@pytest.mark.parametrize("numbers", [(1.0, 100.0, 0.1), (0.3, 0.5, 0.0), (-2.0, 0.02, 3.0)], ids=str)
def test_trajectory_and_gradient_are_those_of_a_plain_loop(isa, n, numbers):
    z = (torch.randn(n, 5, dtype=torch.float64) + 1).requires_grad_()
    draws = torch.randn(5, n, 5, dtype=torch.float64)
    step_size, scale, noise = numbers
    with ivfast.use("cpu"):
        ours = ivfast.svgd_bridge(z, 3, draws=draws, step_size=step_size, scale=scale, noise=noise)
        weights = torch.randn_like(ours)
        (ours_dz,) = torch.autograd.grad(ours, z, weights)
    theirs = loop(z, draws, 3, 2, *numbers)
    (theirs_dz,) = torch.autograd.grad(theirs, z, weights)
    # four steps with |step_size| 2 amplify a rounding of 1e-15 a few hundred times
    assert testing.error(ours, theirs) < 1e-11
    assert testing.error(ours_dz, theirs_dz) < 1e-11


@pytest.mark.parametrize("dtype", testing.TOLERANCES, ids=str)
def test_each_instruction_set_is_right_at_the_edges_of_tiles(isa, dtype):
    sizes = [1, 2, 3, 15, 16, 17, 63, 64, 65, 100, SMALL, SMALL + 1, *torch.randint(4, 150, (4,)).tolist()]
    widths = [*torch.randint(1, 40, (10,)).tolist(), 1, 8, 16, 17, 129, 33]
    for i, (n, d) in enumerate(zip(sizes, widths, strict=True)):
        t = 1 + i % 4
        case = bridge_case((n, d), t, 1 + i % 3)
        testing.check(case, testing.inputs(case, dtype), "cpu")


@pytest.mark.parametrize("shape", [(64, 512), (400, 24), (2, 3, 70, 40)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_shapes(shape, dtype):
    case = bridge_case(shape, 3)
    testing.check(case, testing.inputs(case, dtype), "cpu")


@pytest.mark.parametrize("n", [50, 200])
def test_a_narrow_kernel_leaves_each_particle_its_score(isa, n):
    z = torch.randn(n, 4, requires_grad=True)
    draws = torch.randn(3, n, 4)
    with ivfast.use("cpu"):
        path = ivfast.svgd_bridge(z, 3, iterations=1, draws=draws, scale=1e-30, noise=0.0)
        (dz,) = torch.autograd.grad(path[1].sum(), z)
    torch.testing.assert_close(path[2], z * (1 - 1 / n) ** 2)
    torch.testing.assert_close(dz, torch.full_like(z, 1 - 1 / n))


@pytest.mark.parametrize("n", [1, 40, 200])
def test_particles_at_one_place_stay_together(isa, n):
    z = torch.full((n, 3), 2.0, requires_grad=True)
    with ivfast.use("cpu"):
        path = ivfast.svgd_bridge(z, 3, iterations=1, step_size=0.5, draws=torch.randn(3, n, 3), noise=0.0)
        (dz,) = torch.autograd.grad(path[2].sum(), z)
    torch.testing.assert_close(path[2], torch.full_like(z, 0.5))
    torch.testing.assert_close(dz, torch.full_like(z, 0.25))


@pytest.mark.parametrize("n", [30, 300])
def test_what_is_no_number_stays_none(isa, n):
    z = torch.randn(n, 3)
    z[n // 2] = float("nan")
    draws = torch.randn(5, n, 3)
    path = ivfast.svgd_bridge(z.requires_grad_(), 3, draws=draws)
    assert path[1:-1].isnan().all()
    assert torch.autograd.grad(path.sum(), z)[0].isnan().all()


@pytest.mark.parametrize("shape", [(40, 64, 16), (1, 300, 30), (3, 260, 33), (7, 129, 20), (500, 9, 3)], ids=str)
def test_the_number_of_threads_does_not_change_a_bit(shape, threads):
    case = bridge_case(shape, 3)
    tensors = testing.inputs(case, torch.float32)
    threads(1)
    expected = testing.value_and_gradients(case, tensors)
    for count in (2, 3, 7):
        threads(count)
        actual = testing.value_and_gradients(case, tensors)
        for a, b in zip([*actual[0], *actual[1]], [*expected[0], *expected[1]], strict=True):
            assert torch.equal(a, b), f"{count} threads"


@pytest.mark.parametrize("n", [33, 140])
def test_a_batch_is_its_sets_and_strides_do_not_matter(n):
    z = torch.randn(n, 3, 7, 2).permute(3, 1, 0, 2).requires_grad_()  # [2, 3, n, 7]
    draws = torch.randn(2, 3, n, 7, 7).permute(4, 0, 1, 2, 3)
    weights = torch.randn(n, 5, 2, 3, 7).permute(1, 2, 3, 0, 4)
    whole = ivfast.svgd_bridge(z, 4, draws=draws)
    (dz,) = torch.autograd.grad(whole, z, weights)
    assert whole.is_contiguous()
    for i in range(2):
        for j in range(3):
            one = z[i, j].detach().contiguous().requires_grad_()
            alone = ivfast.svgd_bridge(one, 4, draws=draws[:, i, j].contiguous())
            assert torch.equal(alone, whole[:, i, j])
            (d_one,) = torch.autograd.grad(alone, one, weights[:, i, j].contiguous())
            assert torch.equal(d_one, dz[i, j])


def test_no_gradient_is_recorded_where_none_is_asked_for():
    z = torch.randn(10, 4, requires_grad=True)
    assert not ivfast.svgd_bridge(z.detach(), 3).requires_grad
    with torch.no_grad():
        assert not ivfast.svgd_bridge(z, 3).requires_grad
    assert ivfast.svgd_bridge(z, 3).requires_grad


def test_no_sets_and_no_steps():
    with ivfast.use("cpu"):
        assert ivfast.svgd_bridge(torch.empty(0, 4, 3), 3).shape == (4, 0, 4, 3)
        z, draws = torch.randn(4, 3, requires_grad=True), torch.randn(1, 4, 3)
        path = ivfast.svgd_bridge(z, 1, draws=draws)
        assert torch.equal(path, torch.stack([z.detach(), draws[0]]))
        assert torch.equal(torch.autograd.grad(path.sum(), z)[0], torch.ones(4, 3))


def test_higher_derivatives_are_those_of_the_steps():
    """h is a constant in every step, so finite differences do not apply."""
    draws, weights, t = torch.randn(4, 7, 2).double(), torch.randn(7, 2).double(), torch.randn(7, 2).double()

    def steps(z):
        bridges, x = [z], z
        for step, draw in enumerate(draws[:-1]):
            h = 100 * ivfast.median_bandwidth(x.detach(), convention="paper")
            difference = x.unsqueeze(-2) - x.unsqueeze(-3)  # [i, j, d]
            kernel = (-difference.square().sum(-1) / h).exp()
            x = x + (kernel @ -x + 2 / h * (kernel.unsqueeze(-1) * difference).sum(-2)) / 7 + 0.1 * draw
            if step == 2:
                bridges.append(x)
        return torch.stack([*bridges, draws[-1]])

    z = torch.randn(7, 2).double()
    ours, theirs = (
        [
            torch.func.jvp(loss, (z,), (t,))[1],
            torch.autograd.functional.hessian(loss, z),
            torch.func.hessian(loss)(z),
            torch.func.vmap(torch.func.grad(loss))(torch.stack((z, 2 * z))),
        ]
        for loss in (
            lambda z, f=f: (f(z) * weights).square().sum()
            for f in (lambda z: ivfast.svgd_bridge(z, 2, iterations=3, draws=draws), steps)
        )
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)  # a few hundred terms in float64
