"""The ops alone, as they stand in a training loop of your own: needs nothing but `pip install .`."""

import torch

import ivfast


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 16) * 2 + 1
    print(f"codes against N(0, I): FLD {ivfast.fld(x):.2f}, MMD² {ivfast.mmd(x, torch.randn(256, 16)):.4f}")

    for _ in range(100):  # SVGD moves the codes to the prior
        x = x + ivfast.svgd_direction(x)
    print(f"after 100 steps of SVGD: FLD {ivfast.fld(x):.2f}, MMD² {ivfast.mmd(x, torch.randn(256, 16)):.4f}")

    z = torch.randn(64, 16, requires_grad=True)
    classifier = torch.nn.Linear(16, 5)
    bridge = ivfast.radial_bridge(z, 4)  # five distributions, from the codes to the prior
    loss = ivfast.multi_js_loss(classifier(bridge.flatten(0, 1)))
    loss.backward()
    print(f"a classifier of the bridge's five distributions: loss {loss:.3f}, gradient {z.grad.norm():.2e}")


if __name__ == "__main__":
    main()
