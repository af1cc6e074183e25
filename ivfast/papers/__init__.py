"""The papers' experiments by name. Each prints the paper's numbers next to ours and draws the paper's figure.

An experiment is a row here and a function `(Session) -> Findings` in its paper's file, imported when it runs.
"""

import importlib
from collections.abc import Callable
from typing import NamedTuple

from ..train.declare import did_you_mean


class Experiment(NamedTuple):
    """One table or figure of a paper.

    Attributes:
        name, source: its name on the command line, and its place in the paper.
        about: what it shows, in one sentence.
        data: the data set of the small size, "" if there is none to load.
        paper_data: the data set of the paper, for `--full`.
        seeds, full_seeds: the default number of seeds.
        small, full: descriptions of the two sizes.
        run: "file:function" below this folder.
    """

    name: str
    source: str
    about: str
    data: str
    paper_data: str
    seeds: int
    full_seeds: int
    small: str
    full: str
    run: str

    def function(self) -> Callable:
        module, _, name = self.run.partition(":")
        return getattr(importlib.import_module(f"{__name__}.{module}"), name)


_ROWS = (
    Experiment(
        "s1-fig2", "S1 (IVAAE) Fig. 2",
        "With the encoder and the generator frozen, D's loss falls towards 0 for AAE and much less for IVAAE.",
        "digits", "mnist", 2, 3,
        "50 epochs on digits, then 2,000 steps of D alone; d = 16, 32, 64",
        "50 epochs on MNIST at 64x64 with S1's settings, then 5,000 steps of D alone; d = 16, 32, 64",
        "s1:figure2",
    ),
    Experiment(
        "s1-tables", "S1 (IVAAE) Tables 1 and 2, Figs. 4 and 6",
        "Distances of the codes to the prior (FLD) and of the samples to the images, for the five auto-encoders.",
        "digits", "mnist", 2, 1,
        "100 epochs on digits, 5,000 samples per evaluation",
        "300 epochs with S1's settings, 20,000 samples every 10 epochs; FID if Inception's weights are available",
        "s1:tables",
    ),
    Experiment(
        "s1-fig5", "S1 (IVAAE) Fig. 5",
        "Error rate of a perceptron as it learns the labels from the frozen encoder's last hidden layer.",
        "digits", "mnist", 2, 3,
        "100 epochs on digits, then 1,500 steps of the probe",
        "300 epochs on MNIST with S1's settings, then 10,000 steps of the probe",
        "s1:figure5",
    ),
    Experiment(
        "s2-example1", "S2 (IVGAN) Example 1",
        "Two shifted squares: the GAN's divergence is the same at every shift, the intervention's is not.",
        "", "", 1, 1, "exact, takes a second", "the same", "s2:example1",
    ),
    Experiment(
        "s2-stacked", "S2 (IVGAN) Table 2, Fig. 6",
        "How many of 1,000 modes the GANs cover, and the KL of their histogram to the uniform histogram.",
        "stacked-digits", "stacked-mnist", 1, 1,
        "2,500 steps on stacked digits, seven systems",
        "100,000 steps on stacked MNIST at 64x64",
        "s2:stacked",
    ),
    Experiment(
        "s2-ring", "Lin et al. 2018, Fig. 2 (a test of the systems of S2, IVGAN)",
        "How many of 8 Gaussians on a ring the GANs cover, and what share of the samples lies on one.",
        "ring", "ring", 2, 10, "4,000 steps", "50,000 steps",
        "s2:ring",
    ),
    Experiment(
        "s2-ablation", "S2 (IVGAN) Table 3, Fig. 7",
        "IVLSGAN against the number of blocks k and the weight μ of the intervention loss.",
        "digits", "cifar10", 2, 1,
        "200 epochs on digits, d = 100, 2,000 samples per evaluation",
        "100 epochs on CIFAR-10 at 64x64; FID if Inception's weights are available",
        "s2:ablation",
    ),
    Experiment(
        "s3-table2", "S3 (Unifying Deep Generative Models) Table 2, left and middle",
        "GANs and their importance-weighted forms: classifier score and accuracy of conditional samples.",
        "digits", "mnist", 2, 5, "3,000 steps on digits", "S3's settings on MNIST",
        "s3:gans",
    ),
    Experiment(
        "s3-table3", "S3 (Unifying Deep Generative Models) Table 3",
        "Lower bounds on test images for VAEs and their adversary-activated forms, by share of the data.",
        "digits", "mnist", 1, 1,
        "800 steps on digits at temperatures 1 and 3",
        "S3's settings on MNIST at temperatures 1, 1.5, 3 and 5",
        "s3:bounds",
    ),
    Experiment(
        "s3-table4", "S3 (Unifying Deep Generative Models) Table 4 and Table 2, right",
        "Accuracy of the semi-supervised VAE and of its adversary-activated form, by share of the labels.",
        "digits", "mnist", 2, 5,
        "800 steps on digits at temperatures 1 and 3",
        "S3's settings on MNIST at temperatures 1, 1.5, 3 and 5",
        "s3:accuracies",
    ),
    Experiment(
        "s3-lemma1", "S3 (Unifying Deep Generative Models) Lemma 1 and Eq. 14, Fig. 2",
        "The generator's gradient is that of a KL minus a JSD: both sides, by quadrature on 1-D Gaussians.",
        "", "", 1, 1, "exact, takes a second", "the same", "s3:lemma1",
    ),
    Experiment(
        "s4-table1", "S4 (AVB) Table 1, Fig. 3",
        "AVB and a VAE on four points: AVB's posteriors tile the prior, and its likelihood is closer to the optimum.",
        "four-points", "four-points", 2, 5,
        "6,000 steps, width 128", "30,000 steps, width 512",
        "s4:experiment",
    ),
    Experiment(
        "s5-table1", "S5 (AS-IntroVAE) Table 1 (C1), Fig. 5",
        "Four VAEs on 8 Gaussians: the introspective ones cover the modes.",
        "8-gaussians", "8-gaussians", 1, 3,
        "10,000 steps, batch 128, width 128", "30,000 steps, batch 512, width 256",
        "s5:experiment",
    ),
)  # fmt: skip
EXPERIMENTS: dict[str, Experiment] = {experiment.name: experiment for experiment in _ROWS}


def find(name: str) -> Experiment:
    """The experiment of that name; ValueError names the closest match, or all where none is close."""
    if name in EXPERIMENTS:
        return EXPERIMENTS[name]
    hint = did_you_mean(name, EXPERIMENTS, 0.4) or f"known: {', '.join(EXPERIMENTS)}"
    raise ValueError(f"there is no experiment {name!r}; {hint}")
