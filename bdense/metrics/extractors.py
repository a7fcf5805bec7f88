"""Feature extractors: torch-fidelity's Inception, DINOv2, TorchScript files, small classifiers.

B batch, C channels, H x W pixels, d features.
"""

import io
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bdense.errors import InputError, ShapeError, did_you_mean
from bdense.files import require_no_page, sha256_file
from bdense.metrics.classifiers import RECIPES, Classifier, classifier_checkpoint, load_classifier
from bdense.metrics.dinov2 import SIZES, load_dinov2
from bdense.models.torch_weights import (
    checkpoint_path,
    downloaded_checkpoint,
    last_line,
    reading_checkpoint,
)

# The size that Stein et al. 2023 (arXiv 2306.04675) use to compare generative models.
_DINOV2_DEFAULT = "dinov2-vit-l-14"
_INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
# Image sides that are tried to find the number of features of a TorchScript network.
_PROBE_SIDES = (32, 64, 8, 16, 28, 128, 224, 256, 299)


@dataclass(frozen=True, eq=False, kw_only=True)
class Extractor:
    """A network from images to features, with the name and hash that identify a distance.

    Attributes:
        name: Kind and file name, without folders of this machine.
        dim: d, number of features.
        network: [B, 3, H, W] uint8 -> [B, d].
    """

    name: str
    sha256: str
    dim: int
    network: nn.Module
    device: torch.device

    def __call__(self, images: Tensor) -> Tensor:
        """Features of [B, C, H, W] uint8 images, C = 1 (repeated to 3) or 3: [B, d] float32, CPU.

        Raises:
            ShapeError: The tensor has another type or shape, or a size that the network refuses.
        """
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3):
            raise ShapeError(
                f"extractor {self.name} takes uint8 [B, 1 or 3, H, W], got {images.dtype} "
                f"{list(images.shape)}; convert with to_uint8"
            )
        try:
            features = _features(self.network, images.to(self.device))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, torch.jit.Error) as error:
            raise ShapeError(
                f"extractor {self.name} cannot take images of shape {list(images.shape)}: "
                f"{last_line(error)}"
            ) from error
        if features.shape != (len(images), self.dim):
            raise ShapeError(
                f"extractor {self.name} gave {list(features.shape)} for {len(images)} images, "
                f"not {[len(images), self.dim]}"
            )
        return features.float().cpu()


def require_known(spec: str) -> None:
    """Refuse an extractor that ``load_extractor`` does not know."""
    kind, _, file = spec.partition(":")
    known = ("inception", "dinov2", *SIZES, *RECIPES)
    if kind not in known and not (kind == "torchscript" and file):
        hint = did_you_mean(spec, known)
        raise InputError(
            f"unknown feature extractor {spec!r}; known are {', '.join(known)}, each with :FILE "
            f"for weights of your own, and torchscript:FILE{hint}"
        )


def load_extractor(spec: str, *, cache: Path, device: torch.device) -> Extractor:
    """Make a feature extractor.

    Args:
        spec: ``inception`` (torch-fidelity's, 2048 features, weights downloaded once),
            ``inception:WEIGHTS.pth``, ``dinov2`` (ViT-L/14, 1024 features, weights downloaded
            once), ``dinov2:WEIGHTS.pth``, another of its sizes by torch-fidelity's name
            (``dinov2-vit-s-14``, -b, -l, -g: 384, 768, 1024, 1536 features) likewise,
            ``torchscript:FILE.pt`` (a scripted network of the user's,
            uint8 [B, 3, H, W] -> [B, d]; its program is run), or ``digits-classifier``,
            ``fashion-mnist-classifier``, ``cifar10-classifier`` (small networks of 64 features,
            trained once here) or one of these from a file, ``digits-classifier:FILE``.
        cache: Folder for what is made once.
        device: Where to compute features.

    Raises:
        InputError: The spec is unknown, or its file is missing, corrupt or of another kind.
    """
    require_known(spec)
    kind, _, argument = spec.partition(":")
    argument = os.path.expanduser(argument)
    # Constructors draw initial weights; keep the caller's random state.
    with torch.random.fork_rng(devices=[]):
        if kind == "inception":
            return _inception(argument, device)
        if kind == "dinov2" or kind in SIZES:
            return _dinov2(_DINOV2_DEFAULT if kind == "dinov2" else kind, argument, device)
        if kind == "torchscript":
            return _torchscript(Path(argument), device)
        return _classifier(kind, argument, cache, device)


def missing_checkpoint(spec: str) -> tuple[str, Path] | None:
    """Address and place of the weights that ``load_extractor`` would download, if any."""
    if spec == "inception":
        url = _inception_url()
    elif spec == "dinov2" or spec in SIZES:
        url = SIZES[_DINOV2_DEFAULT if spec == "dinov2" else spec].url
    else:
        return None
    path = checkpoint_path(url)
    return None if path.is_file() else (url, path)


def _made(name: str, path: Path, dim: int, network: nn.Module, device: torch.device) -> Extractor:
    return Extractor(
        name=name,
        sha256=sha256_file(path),
        dim=dim,
        network=network.eval().to(device),
        device=device,
    )


def _inception(weights: str, device: torch.device) -> Extractor:
    from torch_fidelity.utils import create_feature_extractor

    url = _inception_url()
    path = Path(weights) if weights else downloaded_checkpoint(url, "Inception", _INCEPTION_SHA256)
    with reading_checkpoint("torch-fidelity's Inception", path, url):
        # torch-fidelity unpickles weights without restriction. So it gets a copy of what torch's
        # restricted reader found.
        copy = io.BytesIO()
        torch.save(torch.load(path, map_location="cpu", weights_only=True), copy)
        copy.seek(0)
        network = create_feature_extractor(
            "inception-v3-compat",
            ["2048"],
            cuda=False,
            verbose=False,
            feature_extractor_weights_path=copy,
        )
    return _made("inception", path, 2048, _OnlyOutput(network), device)


def _inception_url() -> str:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    return str(URL_INCEPTION_V3)


class _OnlyOutput(nn.Module):
    """torch-fidelity's networks return a tuple of the features of each layer asked for."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        (features,) = self.network(images)
        return features  # type: ignore[no-any-return]  # modules are untyped in torch


def _dinov2(name: str, weights: str, device: torch.device) -> Extractor:
    size = SIZES[name]
    path = Path(weights) if weights else downloaded_checkpoint(size.url, name)
    with reading_checkpoint(name, path, size.url):
        network = load_dinov2(size, path)
    return _made(name, path, size.width, network, device)


def _classifier(name: str, weights: str, cache: Path, device: torch.device) -> Extractor:
    path = Path(weights) if weights else classifier_checkpoint(name, cache)
    network = load_classifier(path)
    if network.name != name:
        raise InputError(
            f"{path} holds a {network.name}, not a {name}; give {network.name}:{path}"
        )
    return _made(name, path, Classifier.DIM, network, device)


def _torchscript(path: Path, device: torch.device) -> Extractor:
    if not path.is_file():
        raise InputError(f"there is no TorchScript file at {path}")
    with warnings.catch_warnings():
        # Deprecated, but its successor cannot read the files that users have.
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.load` is deprecated")
        try:
            script: nn.Module = torch.jit.load(path, map_location="cpu")  # type: ignore[no-untyped-call]
        except (RuntimeError, ValueError) as error:
            require_no_page(path)
            raise InputError(
                f"{path} cannot be read as TorchScript ({last_line(error)}); write it by "
                "torch.jit.save"
            ) from error
    script = script.eval().to(device)
    return _made(f"torchscript:{path.name}", path, _probe(script, path, device), script, device)


def _features(network: nn.Module, images: Tensor) -> Tensor:
    """[B, 1 or 3, H, W] uint8 -> [B, d]."""
    with torch.no_grad():
        return network(images.expand(-1, 3, -1, -1))  # type: ignore[no-any-return]


def _probe(network: nn.Module, path: Path, device: torch.device) -> int:
    """d, from two black images of the first size that the network accepts.

    Raises:
        InputError: It accepts none, or its output is not [B, d] floats.
    """
    for side in _PROBE_SIDES:
        images = torch.zeros(2, 3, side, side, dtype=torch.uint8, device=device)
        try:
            features = _features(network, images)
        except (RuntimeError, torch.jit.Error) as error:
            reason = last_line(error)
            continue
        if not isinstance(features, Tensor):
            got = type(features).__name__
        elif features.dim() == 2 and len(features) == 2 and features.is_floating_point():
            return features.shape[1]
        else:
            got = f"{features.dtype} {list(features.shape)}"
        raise InputError(
            f"{path} maps uint8 {list(images.shape)} to {got}; an extractor gives [B, d] floats"
        )
    raise InputError(f"{path} does not accept uint8 images [B, 3, H, W]: {reason}")
