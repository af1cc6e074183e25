"""Everything that a run depends on, in one frozen record that goes through JSON and back."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .. import _check
from . import files

PRECISIONS = ("fp32", "bf16")
NETS = ("mlp", "conv", "residual")
ENCODER_LOSSES = ("ascent", "confusion")
CODE_RECONSTRUCTIONS = ("prior", "codes")
CONTRASTS = ("prior", "adaptive")
DIVERGENCES = ("js", "kl")
AS_KERNELS = ("product", "additive")
_STREAMS = ("weights", "noise", "order")


@dataclass(frozen=True)
class Settings:
    """Settings of one run; `ivfast.models.preset` fills them in, `dataclasses.replace(settings, seed=1)` changes one.

    Attributes:
        system: a name of `ivfast.models.SYSTEMS`.
        data, root: name of the data set and the folder that holds its files.
        epochs, steps: how long to train; where both are given, steps count.
        batch_size: images per step. The last, partial batch of an epoch is dropped.
        latent_dim: d, the size of a code.
        image_size: side to which images are resized; None keeps the data set's own.
        flip: mirror training images from left to right, each with probability ½. None of the papers does.
        data_memory: GiB of the device's memory that the training images may take; larger sets stay on the host, or in
            their mapped file, and are prefetched. None is half of what is free on a GPU, half of a CPU's memory.
        precision: "fp32", or "bf16" for autocast (weights and optimizer stay in float32).
        compile: compile the shared forward and every loss with `torch.compile`.
        capture: take steps as CUDA graphs; None where the device and the system allow it, and not under `compile`.
        ema: decay of the moving average of the weights; 0 turns it off.
        learning_rates: module name -> learning rate; "default" serves the others.
        milestones: epoch -> factor on every learning rate from that epoch on (factors multiply).
        net, width, depth: "mlp" (hidden layers of `width`) or "conv" (`width` channels in the first layer); of avb also
            "residual", S4's for faces.
        discriminator_width, discriminator_depth: hidden layers of the discriminator's perceptron, where `net` has one.
        t: number of bridges after the code itself; the discriminator names t + 1 distributions.
        lam, mu1, mu2: λ of S1 on the reconstruction (for the WAE systems on the penalty, for infogan on the code, for
            ada on the domains), μ₁ and μ₂ on the cross-entropy of discriminator and encoder; None is S1's 4/(t+1) and
            2/(t+1).
        k, mu: number of blocks that S2's interventions substitute, and μ on the classifier's cross-entropy; `lam` is
            S2's λ on the reconstruction, MRGAN's λ₁ and VEEGAN's weight of its reconstructed noise.
        lam2: MRGAN's λ₂ on −log D(G(E x)).
        code_reconstruction: the codes w that E(G(w)) is to give back in S2: "prior", O_i(z), or "codes", O_i(E x).
        packing: samples that the discriminator judges side by side (PacGAN); it divides batch_size.
        instance_noise: standard deviation of the noise on all that the discriminator sees.
        discriminator_steps: of the discriminator for each one of the generator.
        penalty: λ of WGAN-GP on its gradient penalty.
        unroll: steps by which an unrolled GAN's generator looks ahead, at learning_rates["unrolled"].
        fld_weight: weight, in the encoder's objective, of the batch's Fréchet latent distance; wants batch_size well
            above latent_dim.
        encoder_loss: "ascent" on the cross-entropy, S1's and S2's, or "confusion", descent towards the uniform label.
        temperature: τ of S3's adversary activation, 1, 1.5, 3 or 5 there; above 1 fakes weigh more.
        noise_dim: size of the noise ε that S4's encoder takes beside the image.
        contrast: what S4's discriminator tells codes from: "prior", or "adaptive", a Gaussian with the mean and the
            variance of q(z|x) over `contrast_draws` draws of ε.
        divergence: the objective of S4's discriminator: "js", a GAN's (Eq. 3.3), or "kl", an f-GAN's (Eq. 5.10).
        beta_rec, beta_kl, beta_neg: S5's β on the reconstruction, on the KL of images (of fakes in G's loss), and on
            the fakes' KL in E's (in both losses of introvae).
        gamma_r: γ_r on the reconstruction of fakes in Soft-IntroVAE's generator.
        margin: m of IntroVAE's hinge, nats; it has to lie above the KL of the images.
        vae_steps: steps of a plain VAE before S5's systems become introspective.
        anneal_steps: steps in which AS-IntroVAE's c grows from 0 to 1, S5's T/5; 0 makes it Soft-IntroVAE.
        as_kernel: kernel of its AS-Distance, "product", S5's Eq. 8, or "additive", of the authors' code: per dimension
            of the code. The product is of use in few dimensions: in 64 it is below float32's range, or at its bound.
        classes: number of classes, for systems that read labels.
        data_share, label_share: share of the training images that is used, and of those the share that a
            semi-supervised system sees with labels, chosen class by class (`ivfast.data.stratified`).
        target: the target domain of adversarial domain adaptation, "negative" (the images' own) or a data set.
        log_every: steps per line of the log, and per look at the losses.
        evaluate_every, save_every: epochs between metrics and pictures, and between checkpoints.
        tensorboard: write event files beside the log.

    Raises:
        ValueError: a value out of range, by the field's name.
    """

    system: str = "ivaae-rad"
    data: str = "digits"
    root: str = "data"
    epochs: int = 300
    steps: int | None = None
    batch_size: int = 64
    latent_dim: int = 16
    image_size: int | None = None
    flip: bool = False
    data_memory: float | None = None
    seed: int = 0
    device: str = "cpu"
    precision: str = "fp32"
    compile: bool = False
    capture: bool | None = None
    ema: float = 0.0
    learning_rates: dict[str, float] = field(default_factory=lambda: {"default": 1e-3})
    betas: tuple[float, float] = (0.9, 0.999)
    milestones: dict[int, float] = field(default_factory=dict)
    net: str = "mlp"
    width: int = 1024
    depth: int = 2
    discriminator_width: int = 1024
    discriminator_depth: int = 2
    t: int = 4
    lam: float = 1.0
    mu1: float | None = None
    mu2: float | None = None
    fld_weight: float = 0.0
    encoder_loss: str = "ascent"
    k: int = 4
    mu: float = 0.5
    lam2: float = 0.25
    code_reconstruction: str = "prior"
    packing: int = 1
    instance_noise: float = 0.0
    discriminator_steps: int = 1
    penalty: float = 10.0
    unroll: int = 5
    temperature: float = 1.0
    noise_dim: int = 16
    contrast: str = "prior"
    contrast_draws: int = 8
    divergence: str = "js"
    beta_rec: float = 1.0
    beta_kl: float = 1.0
    beta_neg: float = 1.0
    gamma_r: float = 1e-8
    margin: float = 10.0
    vae_steps: int = 0
    anneal_steps: int = 1000
    as_kernel: str = "product"
    classes: int = 10
    data_share: float = 1.0
    label_share: float = 1.0
    target: str = "negative"
    log_every: int = 50
    evaluate_every: int = 10
    save_every: int = 10
    tensorboard: bool = True

    def __post_init__(self):
        for name in ("epochs", "batch_size", "latent_dim", "width", "discriminator_width", "t", "classes"):
            _check.count(name, getattr(self, name))
        for name in ("log_every", "evaluate_every", "save_every", "k", "packing", "discriminator_steps", "noise_dim"):
            _check.count(name, getattr(self, name))
        for name in ("steps", "image_size"):
            if getattr(self, name) is not None:
                _check.count(name, getattr(self, name))
        _check.count("contrast_draws", self.contrast_draws, at_least=2)
        for name in ("depth", "discriminator_depth", "unroll", "vae_steps", "anneal_steps"):
            _check.count(name, getattr(self, name), at_least=0)
        numbers = ("lam", "lam2", "mu", "mu1", "mu2", "fld_weight", "instance_noise", "penalty", "data_memory")
        for name in numbers:
            if getattr(self, name) is not None:
                _check.number(name, getattr(self, name), non_negative=True)
        for name in ("beta_rec", "beta_kl", "beta_neg", "gamma_r", "margin"):
            _check.number(name, getattr(self, name), non_negative=True)
        for name in ("data_share", "label_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {getattr(self, name)}")
        _check.number("temperature", self.temperature, positive=True)
        if self.fld_weight and self.batch_size < 2:
            raise ValueError("fld_weight needs a batch_size of at least 2, for the covariance of the codes")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be 0 (off) or a decay below 1, got {self.ema}")
        _check.choice("precision", self.precision, PRECISIONS)
        _check.choice("net", self.net, NETS)
        _check.choice("encoder_loss", self.encoder_loss, ENCODER_LOSSES)
        _check.choice("code_reconstruction", self.code_reconstruction, CODE_RECONSTRUCTIONS)
        _check.choice("contrast", self.contrast, CONTRASTS)
        _check.choice("divergence", self.divergence, DIVERGENCES)
        _check.choice("as_kernel", self.as_kernel, AS_KERNELS)
        for name, rate in self.learning_rates.items():
            _check.number(f"learning_rates[{name!r}]", rate, positive=True)

    def stream(self, purpose: str) -> int:
        """The seed of one of the independent random streams that `seed` starts: "weights", "noise" or "order"."""
        seeds = torch.randint(2**31, (len(_STREAMS),), generator=torch.Generator().manual_seed(self.seed))
        return int(seeds[_STREAMS.index(purpose)])

    def learning_rate(self, module: str) -> float:
        """The base rate of a module, before milestones."""
        rates = self.learning_rates
        if module not in rates and "default" not in rates:
            raise ValueError(f"learning_rates must name {module!r} or 'default', got {sorted(rates)}")
        return rates.get(module, rates.get("default"))

    def learning_rate_factor(self, epoch: int) -> float:
        """Product of the factors of all milestones up to `epoch` (from 0)."""
        factor = 1.0
        for milestone in sorted(self.milestones):
            if epoch >= milestone:
                factor *= self.milestones[milestone]
        return factor

    def to_dict(self) -> dict[str, object]:
        """A dictionary that JSON can hold."""
        values = dataclasses.asdict(self)
        values["milestones"] = {str(epoch): factor for epoch, factor in self.milestones.items()}
        values["betas"] = list(self.betas)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, object]) -> "Settings":
        """Inverse of `to_dict`; a field that does not exist raises ValueError."""
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown settings: {', '.join(unknown)}")
        values = dict(values)
        if "milestones" in values:
            values["milestones"] = {int(epoch): factor for epoch, factor in values["milestones"].items()}
        if "betas" in values:
            values["betas"] = tuple(values["betas"])
        return cls(**values)

    def save(self, path: Path) -> None:
        files.replace(path, f"{json.dumps(self.to_dict(), indent=2)}\n".encode())

    @classmethod
    def load(cls, path: Path) -> "Settings":
        return cls.from_dict(json.loads(Path(path).read_text()))
