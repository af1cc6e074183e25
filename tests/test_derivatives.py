"""Every op's derivatives of second order and in forward mode, and under the transforms of torch.func."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import ivfast
from ivfast import testing

FEW = 50  # numbers in a case; of an op without such a case, its smallest
DETACHED = {
    "importance_weighted_loss": lambda l: -(l.softmax(-1).detach() * torch.nn.functional.logsigmoid(l)).sum(-1),
}


def drawn(case):
    return testing.inputs(case, torch.float64, seed=0)


def small() -> list[testing.Case]:
    sizes = [(sum(x.numel() for x in drawn(c)), c) for c in testing.CASES if c.label != "extreme"]
    least = {c.op: size for size, c in sorted(sizes, key=lambda each: -each[0])}
    return [c for size, c in sizes if size <= max(FEW, least[c.op]) and c.op != "multi_js_divergence"]  # log C − loss


cases = pytest.mark.parametrize("case", small(), ids=str)


def of(case):
    """The case's function of its differentiable tensors alone, and these, drawn fresh."""
    tensors = testing.inputs(case, torch.float64)
    count = len(tensors) - case.constants
    return (lambda *x: testing.outputs(case.function(*x, *tensors[count:]))), tensors[:count]


def loss_of(function):
    """A scalar with second derivatives even where the results are linear."""
    return lambda *x: sum((o.sin() + o.square()).sum() for o in function(*x))


def close(ours, theirs):
    # the same formulas in another order, float64; a Hessian may cancel to 1e-3 of its terms
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


@cases
def test_finite_differences(case):
    function, x = of(case)
    if not case.gradcheck:
        pytest.skip("finite differences see what is detached; test_what_is_detached_stays_constant")
    torch.autograd.gradcheck(function, x, check_forward_ad=True, fast_mode=True)
    torch.autograd.gradgradcheck(function, x, fast_mode=True)


@cases
def test_transforms(case):
    function, x = of(case)
    loss, x, every = loss_of(function), tuple(a.detach() for a in x), tuple(range(len(x)))
    tangents = tuple(torch.randn_like(a) for a in x)
    leaves = [a.clone().requires_grad_() for a in x]
    expected = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    slope = sum((g * t).sum() for g, t in zip(expected, tangents, strict=True))
    second = torch.autograd.grad(slope, leaves)  # the Hessian times the tangents

    close(grad(loss, every)(*x), tuple(g.detach() for g in expected))
    value, pull = vjp(loss, *x)
    close(pull(torch.ones_like(value)), tuple(g.detach() for g in expected))
    close(jvp(loss, x, tangents)[1], slope.detach())
    close(jvp(grad(loss, every), x, tangents)[1], second)
    with forward_ad.dual_level():
        dual = loss(*(forward_ad.make_dual(a, t) for a, t in zip(x, tangents, strict=True)))
        close(forward_ad.unpack_dual(dual).tangent, slope.detach())


@cases
def test_batches(case):
    function, x = of(case)
    loss, every = loss_of(function), tuple(range(len(x)))
    batch = tuple(torch.stack((a.detach(), a.detach() * 1.1), 1 if a.dim() else 0) for a in x)
    dims = tuple(1 if a.dim() else 0 for a in x)
    each = [tuple(b.select(d, i) for b, d in zip(batch, dims, strict=True)) for i in range(2)]

    def stacked(f):
        return tuple(torch.stack(results) for results in zip(*(f(*one) for one in each), strict=True))

    close(vmap(function, dims)(*batch), stacked(function))
    close(vmap(grad(loss, every), dims)(*batch), stacked(grad(loss, every)))
    first = lambda a: loss(a, *each[0][1:])  # noqa: E731  # others are not batched
    close(vmap(first, dims[0])(batch[0]), torch.stack([first(one[0]) for one in each]))
    leaves = [b.requires_grad_() for b in batch]
    vmap(loss, dims)(*leaves).sum().backward()
    close(
        torch.stack([b.grad for b in leaves[:1]]), torch.stack([torch.stack([grad(loss)(*o) for o in each], dims[0])])
    )


@pytest.mark.parametrize("op", sorted({case.op for case in small()}))
def test_hessians(op):
    """In every order of the two modes."""
    function, x = of(next(case for case in small() if case.op == op))
    others = [a.detach() for a in x[1:]]
    loss = lambda a: loss_of(function)(a, *others)  # noqa: E731
    expected = torch.autograd.functional.hessian(loss, x[0])
    for transform in (hessian, lambda f: jacrev(jacrev(f)), lambda f: jacfwd(jacfwd(f)), lambda f: jacrev(jacfwd(f))):
        close(transform(loss)(x[0].detach()), expected)


def test_third_derivatives_exist():
    x = torch.randn(4, 3, dtype=torch.float64)
    y = torch.randn(5, 3, dtype=torch.float64)
    for f in (ivfast.fld, lambda x: ivfast.mmd(x, y), lambda x: ivfast.svgd_direction(x, bandwidth=3.0).square().sum()):
        slope = lambda x, f=f: hessian(f)(x).square().sum()  # noqa: E731
        leaf = x.clone().requires_grad_()
        torch.autograd.gradcheck(slope, leaf, rtol=1e-3, atol=1e-5, fast_mode=True)  # at a random direction


def test_what_is_detached_stays_constant():
    logits = torch.randn(6, dtype=torch.float64)
    for name, plain in DETACHED.items():
        op = getattr(ivfast, name)
        close(hessian(op)(logits), torch.autograd.functional.hessian(plain, logits))
        close(jacfwd(op)(logits), jacrev(plain)(logits))


@pytest.mark.parametrize("name", ["fld", "sqrtm_spd", "frechet_distance"])
def test_equal_eigenvalues_have_second_derivatives(name):
    """There the derivatives of an eigendecomposition do not exist, but those of the op do."""
    eye = torch.eye(3, dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(3, dtype=torch.float64)
    codes = (torch.tensor([[1.0], [-1.0]]) * torch.eye(3).unsqueeze(1)).view(6, 3).double().requires_grad_()
    function, x = {
        "fld": (ivfast.fld, codes),
        "sqrtm_spd": (ivfast.sqrtm_spd, eye),
        "frechet_distance": (lambda a: ivfast.frechet_distance(zero, a, zero, torch.eye(3).double()), eye),
    }[name]
    torch.autograd.gradgradcheck(function, x)


def test_a_gradient_penalty_counts():
    mu, logvar = (torch.randn(5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    loss = ivfast.gaussian_kl(mu, logvar).sum()
    dmu, dlogvar = torch.autograd.grad(loss, (mu, logvar), create_graph=True)
    (loss + 10 * (dmu.square().sum() + dlogvar.square().sum())).backward()
    close(mu.grad, mu.detach() + 20 * mu.detach())  # dmu = μ
    e = logvar.detach().exp()
    close(logvar.grad, (e - 1) / 2 + 5 * (e - 1) * e)  # dlogvar = ½ (e^logvar − 1)


def test_zero_logits_have_a_second_derivative():
    """max(x, 0) and |x| have none, but the Bernoulli loss does: σ' = ¼."""
    zeros = torch.zeros(2, 3, dtype=torch.float64)
    op = lambda x: ivfast.reconstruction_loss(x, zeros + 0.3, kind="bce").sum()  # noqa: E731
    close(hessian(op)(zeros).view(6, 6), 0.25 * torch.eye(6, dtype=torch.float64))
    close(jvp(op, (zeros,), (torch.ones_like(zeros),))[1], torch.tensor(6 * 0.2, dtype=torch.float64))


def test_an_empty_batch():
    x = torch.randn(0, 5, 3)
    assert vmap(ivfast.reconstruction_loss)(x, x).shape == (0, 5)
    assert vmap(grad(lambda a: ivfast.reconstruction_loss(a, a.detach()).sum()))(x).shape == x.shape


class Flags(TorchDispatchMode):
    """What `mmd` was asked for."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.ivfast.mmd.default:
            self.asked.append(args[-2:])
        return func(*args, **kwargs or {})


def test_a_map_computes_gradients_only_where_they_are_taken():
    x, y = torch.randn(2, 6, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    leaf, distance = x.clone().requires_grad_(), lambda x: ivfast.mmd(x, y)

    def asked(function):
        with Flags() as flags:
            function()
        return flags.asked

    assert asked(lambda: vmap(distance)(x)) == [(False, False)]
    with torch.no_grad():
        assert asked(lambda: vmap(distance)(leaf)) == [(False, False)]
    tangents = torch.ones_like(x)
    for function in (
        lambda: vmap(distance)(leaf),
        lambda: vmap(grad(distance))(x),
        lambda: grad(lambda x: vmap(distance)(x).sum())(x),
        lambda: jvp(vmap(distance), (x,), (tangents,)),
    ):
        assert asked(function)[0] == (True, True)
    with forward_ad.dual_level():
        assert asked(lambda: vmap(distance)(forward_ad.make_dual(x, tangents)))[0] == (True, True)
    close(vmap(distance)(x), torch.stack([distance(each) for each in x]))
