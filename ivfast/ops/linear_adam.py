"""An Adam step on a linear layer's weights, from the layer's input and its output's gradient."""

from .._registry import register


def linear_adam_reference(weight, mean, square, grad, x, rate, root_correction, beta1, beta2, eps) -> None:
    """g = gradᵀ x;  m ← m + (1 − β₁)(g − m),  v ← β₂ v + (1 − β₂) g²,  w ← w − rate m/(√v · root_correction + ε).

    In place, like any optimizer. With rate = lr/(1 − β₁^s) and root_correction = 1/√(1 − β₂^s) this is step s of Adam.

    Args:
        weight, mean, square: w, m and v `[outputs, inputs]`.
        grad, x: the gradient of the layer's output `[n, outputs]` and the layer's input `[n, inputs]`.

    Source: Kingma & Ba 2014, Alg. 1.
    """
    g = grad.t() @ x
    mean.lerp_(g, 1 - beta1)
    square.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    weight.addcdiv_(mean, square.sqrt().mul_(root_correction).add_(eps), value=-rate)


linear_adam_ = register(
    "linear_adam_(Tensor(a!) weight, Tensor(b!) mean, Tensor(c!) square, Tensor grad, Tensor x, float rate, "
    "float root_correction, float beta1, float beta2, float eps) -> ()",
    reference=linear_adam_reference,
)
