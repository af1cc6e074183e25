"""Every system of the papers by its name on the command line: objectives as phases, nothing else."""

from collections.abc import Iterable

import torch

from ..train.phase import System
from ..train.settings import Settings
from .avb import Avb
from .introvae import AsIntroVae, Introspective, IntroVae, SoftIntroVae
from .ivaae import AutoEncoder, Ivaae, IvaaeBlockwise, IvaaeRadial, IvaaeSvgd, WaeGan, WaeMmd
from .ivgan import EncodingGan, IvDcgan, IvLsgan, LsGan, MrGan, PacDcgan, UnrolledGan, VeeGan, WganGp
from .ivgan import Gan as Dcgan
from .unified import Unified
from .unified_gan import Ada, Cgan, Gan, InfoGan, IwCgan, IwGan
from .unified_vae import AaCvae, AaSvae, AaVae, Activated, Cvae, Svae, Vae

SYSTEMS: dict[str, type[System]] = {
    "wae-mmd": WaeMmd,
    "wae-gan": WaeGan,
    "ivaae-bw": IvaaeBlockwise,
    "ivaae-rad": IvaaeRadial,
    "ivaae-svgd": IvaaeSvgd,
    "ivdcgan": IvDcgan,
    "ivlsgan": IvLsgan,
    "dcgan": Dcgan,
    "lsgan": LsGan,
    "wgan-gp": WganGp,
    "mrgan": MrGan,
    "pacdcgan": PacDcgan,
    "veegan": VeeGan,
    "unrolled-gan": UnrolledGan,
    "gan": Gan,
    "iwgan": IwGan,
    "cgan": Cgan,
    "iwcgan": IwCgan,
    "infogan": InfoGan,
    "ada": Ada,
    "vae": Vae,
    "aavae": AaVae,
    "cvae": Cvae,
    "aacvae": AaCvae,
    "svae": Svae,
    "aasvae": AaSvae,
    "avb": Avb,
    "introvae": IntroVae,
    "s-introvae": SoftIntroVae,
    "as-introvae": AsIntroVae,
}
ALIASES = {"aae": "wae-gan"}
# Settings that not every system reads: to give one to another would do nothing.
READ_BY: dict[str, tuple[type[System], ...]] = {
    **dict.fromkeys(("discriminator_width", "discriminator_depth"), (WaeGan, Ivaae, Dcgan, Unified)),
    "lam": (AutoEncoder, EncodingGan, InfoGan, Ada),
    "fld_weight": (AutoEncoder,),
    **dict.fromkeys(("t", "mu1", "mu2"), (Ivaae,)),
    "encoder_loss": (Ivaae, IvDcgan),
    **dict.fromkeys(("k", "mu", "code_reconstruction"), (IvDcgan,)),
    "lam2": (MrGan,),
    **dict.fromkeys(("packing", "instance_noise"), (Dcgan,)),
    "discriminator_steps": (Dcgan, Avb),
    "penalty": (WganGp,),
    "unroll": (UnrolledGan,),
    "temperature": (Activated,),
    "label_share": (Svae,),
    "target": (Ada,),
    **dict.fromkeys(("noise_dim", "contrast", "contrast_draws", "divergence"), (Avb,)),
    **dict.fromkeys(("beta_rec", "beta_kl", "beta_neg", "vae_steps"), (Introspective,)),
    "gamma_r": (SoftIntroVae,),
    "margin": (IntroVae,),
    **dict.fromkeys(("anneal_steps", "as_kernel"), (AsIntroVae,)),
}


def find(system: str) -> tuple[str, type[System]]:
    """The name in `SYSTEMS` and the factory of a system; ValueError for one that does not exist."""
    name = ALIASES.get(system, system)
    if name not in SYSTEMS:
        raise ValueError(f"system must be one of {', '.join((*SYSTEMS, *ALIASES))}, got {system!r}")
    return name, SYSTEMS[name]


def check_read(system: str, names: Iterable[str]) -> None:
    """Raises ValueError where the system does not read a setting of `READ_BY`."""
    _, factory = find(system)
    for name in names:
        if name in READ_BY and not issubclass(factory, READ_BY[name]):
            readers = [other for other, kind in SYSTEMS.items() if issubclass(kind, READ_BY[name])]
            others = [other for other in SYSTEMS if other not in readers]
            who = ", ".join(readers) if len(readers) < len(others) else f"all but {', '.join(others)}"
            raise ValueError(f"{name} does nothing to {system}; it is read by {who}")


def preset(system: str, data: str) -> Settings:
    """The settings that the system's paper reports for `data`, on the GPU where there is one.

    Data sets that the paper does not use get the settings of the nearest one that it does.

    Raises:
        ValueError: an unknown system.
    """
    name, factory = find(system)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Settings(**{"system": name, "data": data, "device": device, **factory.preset(data)})


def build(settings: Settings, image_shape: tuple[int, ...]) -> System:
    """The system that `settings` describe, freshly initialised on `settings.device`.

    `image_shape` is (C, H, W) of images, or (D,) of points. The weights follow from `settings.seed` alone; PyTorch's
    global generators are left as they were.

    Raises:
        ValueError: an unknown system, an image shape that its networks cannot take.
    """
    _, factory = find(settings.system)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings.stream("weights"))  # weights are drawn on the CPU, then moved
        return factory(settings, tuple(image_shape))
