"""pytorch-fid's Inception network, from local weights unless a download is requested."""

from pathlib import Path
from unittest import mock

import torch
from torch import nn

from .. import _defaults
from .._extra import needs

FEATURES = (64, 192, 768, 2048)


class WeightsNotFound(FileNotFoundError):
    """Inception's weights are not on this machine; the message says where they were expected."""


@needs("Inception")
@_defaults.initial()
def inception(weights: str | Path | None = None, *, download: bool = False, features: int = 2048) -> nn.Module:
    """Inception v3 as defined for FID: images `[n, 3, H, W]` in [0, 1] to one feature map.

    Args:
        weights: path of pytorch-fid's `pt_inception-2015-12-05-6726825d.pth`; None looks in torch.hub's cache.
        download: fetch the weights (91 MB) into that cache if they are missing.
        features: width of the layer, 64, 192, 768 or 2048; only 2048 is FID as the papers report it.

    Raises:
        WeightsNotFound: there are no weights, and `download` is False or fails.
        ValueError: the file does not contain these weights.
    """
    from pytorch_fid import inception as network

    if features not in FEATURES:
        raise ValueError(f"features must be one of {', '.join(map(str, FEATURES))}, got {features}")
    state = _state(weights, network.FID_WEIGHTS_URL, download)
    try:
        # the constructor would download by itself; give it the local weights instead
        with mock.patch.object(network, "load_state_dict_from_url", return_value=state):
            model = network.InceptionV3([network.InceptionV3.BLOCK_INDEX_BY_DIM[features]])
    except RuntimeError as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"{weights or 'the cached file'} does not hold pytorch-fid's Inception: {first}") from error
    return model.eval()


def _state(weights: str | Path | None, url: str, download: bool) -> dict:
    cached = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    path = Path(weights).expanduser() if weights else cached
    if not path.is_file():
        if weights or not download:
            raise WeightsNotFound(
                f"FID needs pytorch-fid's Inception weights, and {path.absolute()} does not exist. Give the file with "
                "--inception-weights, fetch it (91 MB) with --download, or use classifier-distance, which needs none."
            )
        try:
            return torch.hub.load_state_dict_from_url(url, check_hash=True, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError) as error:
            raise WeightsNotFound(f"{url} could not be downloaded to {path.parent}: {error}") from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file may raise anything
        raise ValueError(f"{path} does not hold weights: {error}") from error
