"""Features for a Frechet distance: torch-fidelity's Inception, a TorchScript file, digits.

All are torch-fidelity ``FeatureExtractorBase`` networks, found in its registry and made by its
``create_feature_extractor``. B batch, C channels, H x W pixels, d features.
"""

import functools
import http.client
import io
import pickle
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from bdense.digits_classifier import (
    DigitsClassifier,
    digits_classifier_weights,
    load_digits_classifier,
)
from bdense.errors import InputError, ShapeError
from bdense.files import sha256_file

SPECS = "inception, inception:WEIGHTS.pth, torchscript:FILE.pt, digits-classifier"
# Names in torch-fidelity's registry; the weights file goes in as feature_extractor_weights_path.
TORCHSCRIPT = "bdense-torchscript"
DIGITS_CLASSIFIER = "bdense-digits-classifier"
INCEPTION = "inception-v3-compat"
FEATURES = "features"

_INCEPTION_LAYER = "2048"
_INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
# A network that takes one size only is asked for its feature count at the usual ones.
_PROBE_SIDES = (32, 64, 8, 16, 28, 128, 224, 256, 299)


@dataclass(frozen=True, eq=False, kw_only=True)
class Extractor:
    """Images to features, with what is needed to name them beside a distance.

    Attributes:
        name: Kind and file name; no folder of this machine.
        sha256: Hex digest of the weights file.
        dim: d, features of an image.
        network: torch-fidelity extractor: [B, 3, H, W] uint8 -> ([B, d],).
        device: Where ``network`` is.
        metadata: What is known of its training (``train_accuracy`` of the digits classifier).
    """

    name: str
    sha256: str
    dim: int
    network: nn.Module
    device: torch.device
    metadata: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def __call__(self, images: Tensor) -> Tensor:
        """Features of [B, C, H, W] uint8 images, C = 1 (repeated to 3) or 3: [B, d] float32, CPU.

        Raises:
            ShapeError: The images are no such images, or of a size the network cannot take.
        """
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3):
            raise ShapeError(
                f"extractor {self.name} takes uint8 [B, 1 or 3, H, W]; got {images.dtype} "
                f"{list(images.shape)}: convert with to_uint8"
            )
        try:
            features = _features(self.network, images.to(self.device))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, torch.jit.Error) as error:
            raise ShapeError(
                f"extractor {self.name} cannot take images of shape {list(images.shape)}: "
                f"{_last_line(error)}"
            ) from error
        if features.shape != (len(images), self.dim):
            raise ShapeError(
                f"extractor {self.name} gave {list(features.shape)} for {len(images)} images, "
                f"not {[len(images), self.dim]}"
            )
        return features.float().cpu()


def load_extractor(spec: str, *, cache: Path, device: torch.device) -> Extractor:
    """Make a feature extractor.

    Args:
        spec: ``inception`` (torch-fidelity's, 2048 features, weights downloaded once),
            ``inception:WEIGHTS.pth``, ``torchscript:FILE.pt`` (a scripted network of the user's,
            uint8 [B, 3, H, W] -> [B, d]; its program is run), or ``digits-classifier`` (a small
            network on 8 x 8 digits, 64 features, trained once).
        cache: Folder for what is made once.
        device: Where to compute features.

    Raises:
        InputError: The spec is unknown, or its file is missing, corrupt or of another kind.
    """
    kind, _, argument = spec.partition(":")
    if kind == "inception":
        return _inception(argument, device)
    if kind == "torchscript" and argument:
        return _torchscript(Path(argument), device)
    if spec == "digits-classifier":
        return _digits_classifier(cache, device)
    raise InputError(f"unknown feature extractor {spec!r}; known are {SPECS}")


def _digits_classifier(cache: Path, device: torch.device) -> Extractor:
    path, metadata = digits_classifier_weights(cache)
    return Extractor(
        name="digits-classifier",
        sha256=sha256_file(path),
        dim=DigitsClassifier.DIM,
        network=_create(DIGITS_CLASSIFIER, FEATURES, path, device),
        device=device,
        metadata=MappingProxyType(metadata),
    )


def _torchscript(path: Path, device: torch.device) -> Extractor:
    network = _create(TORCHSCRIPT, FEATURES, path, device)
    return Extractor(
        name=f"torchscript:{path.name}",
        sha256=sha256_file(path),
        dim=_probe(network, path, device),
        network=network,
        device=device,
    )


def _inception(weights: str, device: torch.device) -> Extractor:
    path = Path(weights) if weights else _inception_download()
    try:
        # torch-fidelity unpickles the weights it is given without restriction, so it is given a
        # copy written here of what the restricted reader found.
        copy = io.BytesIO()
        torch.save(torch.load(path, map_location="cpu", weights_only=True), copy)
        copy.seek(0)
        network = _create(INCEPTION, _INCEPTION_LAYER, copy, device)
    except OSError as error:
        raise InputError(f"cannot read the Inception weights {path}: {error.strerror}") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, TypeError) as error:
        raise InputError(
            f"{path} does not hold torch-fidelity's Inception weights ({_last_line(error)}); "
            f"give the file of {_inception_url()}"
        ) from error
    return Extractor(
        name="inception", sha256=sha256_file(path), dim=2048, network=network, device=device
    )


def _inception_url() -> str:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    return str(URL_INCEPTION_V3)


def _inception_download() -> Path:
    """The weights where torch-fidelity keeps them, fetched from its own address if need be."""
    url = _inception_url()
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    by_hand = f"fetch {url} by hand and put it at {path}, or give inception:FILE"
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), _INCEPTION_SHA256, progress=False)
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            raise InputError(
                f"cannot download the Inception weights ({error}); {by_hand}"
            ) from error
    if sha256_file(path) != _INCEPTION_SHA256:
        raise InputError(f"{path} is not the Inception weights file: delete it; {by_hand}")
    return path


def _create(name: str, layer: str, weights: Path | BinaryIO, device: torch.device) -> nn.Module:
    from torch_fidelity.utils import create_feature_extractor

    _register()
    # Constructors draw the weights that the file then replaces: not from the caller's state.
    with torch.random.fork_rng(devices=[]):
        network: nn.Module = create_feature_extractor(
            name, [layer], cuda=False, verbose=False, feature_extractor_weights_path=weights
        )
    return network.to(device)


@functools.cache
def _register() -> None:
    """Add ours to torch-fidelity's registry; once, as a name may not be registered again."""
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase
    from torch_fidelity.registry import register_feature_extractor

    class OneLayer(FeatureExtractorBase):  # type: ignore[misc]  # torch-fidelity is untyped
        """[B, 3, H, W] uint8 -> ([B, d],), by a network read from its weights file."""

        def __init__(
            self,
            name: str,
            features_list: list[str],
            feature_extractor_weights_path: Path,
            **_: object,
        ) -> None:
            super().__init__(name, features_list)
            self.body = _BODIES[name](Path(feature_extractor_weights_path))

        @staticmethod
        def get_provided_features_list() -> tuple[str]:
            return (FEATURES,)

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return FEATURES

        @staticmethod
        def can_be_compiled() -> bool:
            return False

        def forward(self, images: Tensor) -> tuple[Tensor]:
            return (self.body(images),)

    for name in _BODIES:
        register_feature_extractor(name, OneLayer)


def _load_torchscript(path: Path) -> nn.Module:
    if not path.is_file():
        raise InputError(f"there is no TorchScript file at {path}")
    with warnings.catch_warnings():
        # The format of the files that users have; its successor cannot read them.
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.load` is deprecated")
        try:
            script: nn.Module = torch.jit.load(path, map_location="cpu")  # type: ignore[no-untyped-call]
        except (RuntimeError, ValueError) as error:
            raise InputError(
                f"{path} cannot be read as TorchScript ({_last_line(error)}); write it with "
                "torch.jit.save"
            ) from error
    return script


_BODIES: dict[str, Callable[[Path], nn.Module]] = {
    TORCHSCRIPT: _load_torchscript,
    DIGITS_CLASSIFIER: load_digits_classifier,
}


def _features(network: nn.Module, images: Tensor) -> Tensor:
    """[B, 1 or 3, H, W] uint8 -> what the extractor's one layer gives."""
    with torch.no_grad():
        (features,) = network(images.expand(-1, 3, -1, -1))
    return features  # type: ignore[no-any-return]  # modules are untyped in torch


def _probe(network: nn.Module, path: Path, device: torch.device) -> int:
    """d, of two black images of the first size that the network takes.

    Raises:
        InputError: It takes none, or its output is not [B, d] of floats.
    """
    for side in _PROBE_SIDES:
        images = torch.zeros(2, 3, side, side, dtype=torch.uint8, device=device)
        try:
            features = _features(network, images)
        except (RuntimeError, torch.jit.Error) as error:
            reason = _last_line(error)
            continue
        if not isinstance(features, Tensor):
            got = type(features).__name__
        elif features.dim() == 2 and len(features) == 2 and features.is_floating_point():
            return features.shape[1]
        else:
            got = f"{features.dtype} {list(features.shape)}"
        raise InputError(
            f"{path} turns uint8 {list(images.shape)} into {got}; an extractor gives [B, d] floats"
        )
    raise InputError(f"{path} takes no uint8 images [B, 3, H, W]: {reason}")


def _last_line(error: BaseException) -> str:
    """The reason itself: torch puts the interpreter's stack in front of it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
