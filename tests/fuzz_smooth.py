"""Where an op can be differentiated, once and twice, so that every right way to compute it agrees."""

import formulas
import rounded
import torch
from torch import Tensor


def well_conditioned(*matrices: Tensor) -> bool:
    """Whether square roots have derivatives that float64 can compute in several ways."""
    values = [torch.linalg.eigvalsh((a + a.mT) / 2) for a in (m.double() for m in matrices)]
    return all(bool((v[..., 0] > 1e-6 * v[..., -1]).all()) for v in values)


def one_pair(x: Tensor, convention: str) -> bool:
    """Whether the middle distances are those of one pair of rows each, and of its duplicates, clear of all others.

    Ties of different pairs, which half precision makes on its grid, do not survive rounding: which of them share the
    gradient is open.
    """
    for rows in x.double().reshape(-1, *x.shape[-2:]):
        values = formulas.pair_distances(rows, convention).sort().values
        d2 = rounded.squares(rows, rows)
        for m in (values[(len(values) - 1) // 2], values[len(values) // 2]):
            i, j = ((d2 - m).abs() <= 1e-4 * m).nonzero(as_tuple=True)
            first, last = rows[i[0]], rows[j[0]]
            one = (rows[i] == first) & (rows[j] == last), (rows[i] == last) & (rows[j] == first)
            if m > 0 and not all(one[0].all(-1) | one[1].all(-1)):
                return False
    return True


def full_rank(m: Tensor) -> bool:
    S = torch.linalg.svdvals(m.double())
    return bool((S[..., -1] > 1e-3 * S[..., 0]).all())


def factor(x: Tensor) -> Tensor:
    return formulas.covariance_factor(x.double())[1]


def distinct(x: Tensor) -> bool:
    return all(len(rows.unique(dim=0)) == len(rows) for rows in x.reshape(-1, *x.shape[-2:]))


TWICE = {
    "fld": lambda z: full_rank(factor(z)),  # the formulas differentiate singular vectors
    "frechet_distance_from_samples": lambda x, y: full_rank(factor(x) @ factor(y).mT),
    "median_bandwidth": distinct,  # a median has no second derivative at ties
}


SMOOTH = {
    "frechet_distance": lambda mu1, sigma1, mu2, sigma2: well_conditioned(sigma1, sigma2),
    "median_bandwidth": one_pair,
    "multi_js_block_losses": lambda logits: False,  # for logging
    "polar": full_rank,
    "sqrtm_spd": lambda a: well_conditioned(a),
}
