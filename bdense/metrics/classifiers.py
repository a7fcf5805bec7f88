"""Small classifiers whose last hidden layer gives features for FID.

Each is trained once, on one thread and from explicit seeds, and kept as safetensors. B batch, C
channels.
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bdense.data.datasets import load_dataset
from bdense.errors import CheckpointError, InputError, ShapeError
from bdense.files import file_lock, require_cache, sha256_file
from bdense.metrics.records import FID
from bdense.models.diffusers_files import EXTRACTOR
from bdense.models.store import load_tensors, save_tensors
from bdense.randomness import Stream, generator, one_thread, seeded

# Part of the file's name; raise it when a change below changes the weights.
_RECIPE = 1
_BATCH = 64
_LR = 1e-3
_SEED = 0
_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Training set, side that its images are padded to, and epochs."""

    data: str
    side: int
    epochs: int


# By the extractor's name.
RECIPES = {
    "digits-classifier": Recipe(data="digits", side=8, epochs=12),
    "fashion-mnist-classifier": Recipe(data="fashion-mnist", side=32, epochs=3),
    # Barely trained: to check that everything runs, not to compare.
    "cifar10-classifier": Recipe(data="cifar10", side=32, epochs=1),
}


class Classifier(nn.Module):
    """Convolutions down to 4 x 4 pixels and two linear layers; features are the last one's input.

    Colours are averaged, so one classifier serves grey images and their three-channel copies.

    Args:
        name: Its name in errors.
        side: H = W of the training images: 8, 16, 32, ...
        num_classes: Classes of the training set.
    """

    DIM = 64

    def __init__(self, name: str, side: int, num_classes: int) -> None:
        super().__init__()
        if side < 8 or side & (side - 1):
            raise InputError(f"{name} must have a side of 8, 16, 32, ... pixels, got {side}")
        self.name, self.side = name, side
        self.conv0 = nn.Conv2d(1, 32, 3, padding=1)
        self.convs, channels = 1, 32
        while side > 4:
            wider = min(2 * channels, 128)
            halving = nn.Conv2d(channels, wider, 3, padding=1, stride=2)
            self.add_module(f"conv{self.convs}", halving)
            self.convs, channels, side = self.convs + 1, wider, side // 2
        self.hidden = nn.Linear(channels * side**2, self.DIM)
        self.classes = nn.Linear(self.DIM, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] uint8, H = W, side / 2 < H <= side, padded to ``side`` -> [B, 64] float32.

        Raises:
            ShapeError: The images are larger, much smaller, or not square.
        """
        height, width = images.shape[2:]
        if height != width or not self.side < 2 * height <= 2 * self.side:
            raise ShapeError(
                f"{self.name} takes square images of more than {self.side // 2} and at most "
                f"{self.side} pixels a side, got {list(images.shape)}; choose another extractor"
            )
        before = (self.side - height) // 2
        after = self.side - height - before
        grey = F.pad(images, (before, after, before, after)).float().mean(dim=1, keepdim=True)
        x = grey / 127.5 - 1
        for index in range(self.convs):
            x = F.silu(self.get_submodule(f"conv{index}")(x))
        return F.silu(self.hidden(x.flatten(1)))


def classifier_checkpoint(name: str, cache: Path) -> Path:
    """The file in ``cache`` of one of ``RECIPES``, trained if missing.

    Raises:
        InputError: The data set is missing and cannot be downloaded, or the cache not written.
    """
    require_cache(Path(cache))
    path = classifier_path(name, cache)
    with file_lock(path.with_suffix(".lock")):
        if not path.exists():
            recipe = RECIPES[name]
            network, accuracy = _train(name, recipe)
            facts = {"kind": name, "train_accuracy": accuracy, "epochs": recipe.epochs}
            save_tensors(path, network.state_dict(), facts)
    return path


def classifier_path(name: str, cache: Path) -> Path:
    """Where ``classifier_checkpoint`` has its file, whether it exists or not."""
    return Path(cache) / f"{name}-{_RECIPE}.safetensors"


def add_classifier(folder: Path, fid: FID, cache: Path) -> None:
    """Add the classifier of a FID to a model folder, as another machine would train another one.

    A FID in features of no such classifier needs none. One that is not in the cache any more is
    told on stderr.
    """
    if fid.extractor not in RECIPES:
        return
    path = classifier_path(fid.extractor, cache)
    if path.is_file() and sha256_file(path) == fid.extractor_sha256:
        shutil.copyfile(path, folder / EXTRACTOR)
    else:
        sys.stderr.write(
            f"{path} is not the {fid.extractor} of the FID, so that `bdense verify` will need "
            "--extractor\n"
        )


def load_classifier(path: Path) -> Classifier:
    """Read a classifier that ``classifier_checkpoint`` wrote.

    Raises:
        CheckpointError: The file is missing, cut short, or holds something else.
    """
    tensors, metadata = load_tensors(path)
    try:
        name = metadata["kind"]
        network = Classifier(name, RECIPES[name].side, len(tensors["classes.bias"]))
        network.load_state_dict(tensors)
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} does not hold a classifier; delete it to have it trained again"
        ) from error
    return network


def _train(name: str, recipe: Recipe) -> tuple[Classifier, float]:
    """The trained network and its accuracy on the training images."""
    dataset = load_dataset(f"{recipe.data}@{recipe.side}")
    images, labels = dataset.images, dataset.labels
    assert labels is not None
    with one_thread():
        with seeded(_CPU, _SEED, Stream.CLASSIFIER):
            network = Classifier(name, recipe.side, dataset.num_classes)
        optimizer = torch.optim.Adam(network.parameters(), lr=_LR)
        for epoch in range(recipe.epochs):
            draw = generator(_SEED, Stream.CLASSIFIER, epoch)
            for batch in torch.split(torch.randperm(len(images), generator=draw), _BATCH):
                optimizer.zero_grad(set_to_none=True)
                loss = F.cross_entropy(network.classes(network(images[batch])), labels[batch])
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        with torch.no_grad():
            parts = torch.split(images, 1024)
            guesses = torch.cat([network.classes(network(part)).argmax(dim=1) for part in parts])
        return network, guesses.eq(labels).double().mean().item()
