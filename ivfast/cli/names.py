"""The systems, data sets and metrics of the command line, and what each is."""

# Each with the paper it is from.
SYSTEMS = {
    "ivaae-rad": "IVAAE, radial bridge (S1)",
    "ivaae-bw": "IVAAE, blockwise bridge (S1)",
    "ivaae-svgd": "IVAAE, SVGD bridge (S1)",
    "wae-gan": "WAE-GAN, which is AAE (Tolstikhin et al. 2017; S1)",
    "wae-mmd": "WAE-MMD (Tolstikhin et al. 2017; S1)",
    "ivdcgan": "IVGAN on DCGAN: tells which block of a code was replaced (S2)",
    "ivlsgan": "IVGAN on LSGAN (S2)",
    "dcgan": "DCGAN, the non-saturating GAN (Radford et al. 2015; S2)",
    "lsgan": "LSGAN, least squares (Mao et al. 2016; S2)",
    "wgan-gp": "WGAN with gradient penalty (Gulrajani et al. 2017; S2)",
    "mrgan": "MRGAN, mode-regularised (Che et al. 2016; S2)",
    "pacdcgan": "PacDCGAN, judges samples in packs (Lin et al. 2018; S2)",
    "veegan": "VEEGAN, judges codes with images (Srivastava et al. 2017; S2)",
    "unrolled-gan": "Unrolled GAN, looks ahead to D's steps (Metz et al. 2017; S2)",
    "gan": "GAN, non-saturating (Goodfellow et al. 2014; S3 Eq. 7)",
    "iwgan": "GAN whose generator's loss is importance-weighted (S3 Eq. 22)",
    "cgan": "class-conditional GAN; reads labels (S3, section 5.1)",
    "iwcgan": "its importance-weighted form; reads labels (S3, section 5.1)",
    "infogan": "GAN that recovers the code of its samples (S3 Eq. 15)",
    "ada": "adversarial domain adaptation to a --target; reads labels (S3)",
    "vae": "VAE of Bernoulli pixels (Kingma & Welling 2014; S3 Eq. 17)",
    "aavae": "adversary-activated VAE: learns from samples too (S3 Eq. 23)",
    "cvae": "class-conditional VAE; reads labels (S3, section 5.2)",
    "aacvae": "its adversary-activated form; reads labels (S3, section 5.2)",
    "svae": "semi-supervised VAE, M2; reads a --label-share of labels (S3)",
    "aasvae": "its adversary-activated form (S3, section 5.2)",
    "avb": "VAE with a black-box posterior; T learns its KL (S4 Alg. 1)",
    "introvae": "IntroVAE: E judges by a KL with a margin (Huang 2018; S5)",
    "s-introvae": "Soft-IntroVAE: by exp(ELBO) (Daniel & Tamar 2021; S5)",
    "as-introvae": "AS-IntroVAE: first by an AS-Distance (S5 Eq. 9)",
}
DATA = {
    "digits": "scikit-learn's handwritten digits, 8x8, embedded",
    "mnist, fashion-mnist": "below --root, in torchvision's layout",
    "cifar10, svhn, celeba": "the same",
    "stl10, stl10-all": "the same; the second with the unlabelled images",
    "lsun:CATEGORY": "lsun:church_outdoor, ...; needs the package lmdb",
    "folder": "your own images: every image file below --root",
    "stacked-digits": "three digits as colours, 1,000 modes (S2)",
    "stacked-mnist": "three MNIST digits as colours (S2)",
    "ring, grid, 8-gaussians": "points in the plane: 8, 25 and 8 Gaussians",
    "spirals, checkerboard": "points in the plane without separate modes",
    "four-points": "the four unit vectors of four dimensions (S4)",
}
METRICS = {
    "fld": "Fréchet distance of the codes to the prior (S1)",
    "reconstruction": "mean squared error, PSNR and SSIM on test images",
    "classifier-distance": "Fréchet distance in a classifier's features; not FID",
    "classifier-score": "the Inception score's formula with that classifier",
    "bound": "lower bound on test images, nats (S3); avb's own (S4)",
    "likelihood": "of test images, by importance sampling, nats",
    "kl-to-prior": "KL of the aggregated posterior to the prior, nats (S4)",
    "accuracy": "of the system's own classifier on test images (S3)",
    "conditional-accuracy": "share of samples classified as their class (S3)",
    "fid": "Inception FID; needs pytorch-fid's weights",
    "probe": "error of a perceptron trained on the codes (S1)",
    "modes": "modes covered, of stacked digits or Gaussians (S2)",
    "histogram": "KL and JSD of points in the plane (S5), JS in nats",
}
PAPERS = (
    "S1: Intervention Adversarial Auto-Encoder. S2: Intervention GAN.\n"
    "S3: On Unifying Deep Generative Models. S4: Adversarial Variational Bayes.\n"
    "S5: AS-IntroVAE."
)
