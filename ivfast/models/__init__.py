"""Every system of the papers by its name on the command line: objectives as phases, nothing else."""

import torch

from .. import _defaults
from ..data.sources import DATASETS
from ..train.declare import About, table
from ..train.phase import System
from ..train.settings import Settings, no_system, one_of, register
from .avb import Avb
from .gan import Gan as Dcgan
from .gan import LsGan, PacDcgan, UnrolledGan, WganGp
from .introvae import AsIntroVae, IntroVae, SoftIntroVae
from .ivaae import IvaaeBlockwise, IvaaeRadial, IvaaeSvgd, WaeGan, WaeMmd
from .ivgan import IvDcgan, IvLsgan, MrGan, VeeGan
from .unified_gan import Ada, Cgan, Gan, InfoGan, IwCgan, IwGan
from .unified_vae import AaCvae, AaSvae, AaVae, Cvae, Svae, Vae

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
DOCUMENTATION = """# Settings

`ivfast train SYSTEM --help` shows the settings of one system with the paper's values for the data set. The defaults
below hold where a paper says nothing. `config.json` and Python use the names below; the option of `image_size` is
`--image-size`. `ivfast.models.documentation()` writes this page.
"""
register(SYSTEMS)


def find(system: str) -> tuple[str, type[System]]:
    """The name in `SYSTEMS` and the factory of a system; ValueError for one that does not exist."""
    name = ALIASES.get(system, system)
    if name not in SYSTEMS:
        raise ValueError(no_system(system, (*SYSTEMS, *ALIASES)))
    return name, SYSTEMS[name]


def settings(system: str, **values: object) -> Settings:
    """The system's settings, at its family's defaults where `values` do not say otherwise; no paper's.

    Raises:
        ValueError: an unknown system, a value out of range, a setting that the system does not have.
    """
    name, factory = find(system)
    return factory.Settings(system=name, **values)


def preset(system: str, data: str) -> Settings:
    """The settings that the system's paper reports for `data`, on the GPU where there is one.

    Data sets that the paper does not use get the settings of the nearest one that it does.

    Raises:
        ValueError: an unknown system.
    """
    name, factory = find(system)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return settings(name, **{"data": data, "device": device, **factory.Settings.own(factory.preset(data))})


def check_data(system: str, data: str) -> None:
    """Raises ValueError for a system that cannot learn from the data set of that name.

    The message says which systems can, and from which data sets the system can.
    """
    name, factory = find(system)
    if reason := _misfit(factory, data):
        fitting = [other for other, its in SYSTEMS.items() if _misfit(its, data) is None]
        raise ValueError(f"{name} {reason}; what can learn from it: {', '.join(fitting)}; {learnable(name)}")


def learnable(system: str) -> str:
    """A phrase that says from which data sets a system can learn."""
    name, factory = find(system)
    return f"{name} can learn from {', '.join(data for data in DATASETS if _misfit(factory, data) is None)}"


def _misfit(factory: type[System], data: str) -> str | None:
    known = DATASETS.get(data.partition(":")[0])
    if factory.labels != "none" and known is not None and not known.labelled:
        return f"learns from labels, and {data} has none"
    return factory.misfit(data)


def documentation() -> str:
    """Every setting in Markdown, with the systems that have it."""
    having: dict[About, list[str]] = {}
    for name, factory in SYSTEMS.items():
        for entry in factory.Settings.declared().values():
            having.setdefault(entry, []).append(name)
    return f"{DOCUMENTATION}\n{table({entry: one_of(names, SYSTEMS) for entry, names in having.items()})}\n"


@_defaults.initial()
def build(settings: Settings, image_shape: tuple[int, ...]) -> System:
    """The system that `settings` describe, freshly initialised on `settings.device`.

    `image_shape` is (C, H, W) of images, or (D,) of points. The weights follow from `settings.seed` alone; PyTorch's
    global generators are left as they were.

    Raises:
        ValueError: an unknown system, a data set that it does not fit, an image shape that its networks cannot take,
            a learning rate of a network that it does not have, settings of which one rules out another.
    """
    check_data(settings.system, settings.data)
    _, factory = find(settings.system)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings.stream("weights"))  # weights are drawn on the CPU, then moved
        system = factory(settings, tuple(image_shape))
    system.check()
    return system
