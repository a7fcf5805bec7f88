"""A small classifier of the 8 x 8 digits, whose last hidden layer gives features for FID.

Trained once, on one thread and from explicit generators, and kept as safetensors. B batch.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bdense.checkpoints import load_tensors, save_tensors
from bdense.data import load_dataset
from bdense.errors import CheckpointError, ShapeError
from bdense.files import file_lock
from bdense.randomness import Stream, generator, seeded

# Part of the file's name: raise it with any change below that moves the weights.
_RECIPE = 1
_EPOCHS = 12
_BATCH = 64
_LR = 1e-3
_SEED = 0
_CPU = torch.device("cpu")


class DigitsClassifier(nn.Module):
    """Two convolutions and two linear layers; features are what the last of them sees."""

    DIM = 64
    SIDE = 8

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv1 = nn.Conv2d(32, 64, 3, padding=1, stride=2)
        self.hidden = nn.Linear(64 * (self.SIDE // 2) ** 2, self.DIM)
        self.classes = nn.Linear(self.DIM, 10)

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, 8, 8] uint8, colours averaged -> [B, 64] float32.

        Raises:
            ShapeError: The images are not of 8 x 8 pixels.
        """
        if images.shape[2:] != (self.SIDE, self.SIDE):
            raise ShapeError(
                f"the digits classifier takes images of {self.SIDE} x {self.SIDE} pixels, got "
                f"{list(images.shape)}; choose another feature extractor"
            )
        grey = images.float().mean(dim=1, keepdim=True) / 127.5 - 1
        x = F.silu(self.conv1(F.silu(self.conv0(grey))))
        return F.silu(self.hidden(x.flatten(1)))


def digits_classifier_weights(cache: Path) -> tuple[Path, dict[str, Any]]:
    """The weights file and its metadata (``train_accuracy``), trained now if it is not there."""
    path = Path(cache) / f"digits-classifier-{_RECIPE}.safetensors"
    with file_lock(path.with_suffix(".lock")):
        if not path.exists():
            network, accuracy = _train()
            facts = {"kind": "digits-classifier", "train_accuracy": accuracy, "epochs": _EPOCHS}
            save_tensors(path, network.state_dict(), facts)
    return path, load_tensors(path)[1]


def load_digits_classifier(path: Path) -> DigitsClassifier:
    """The classifier with the weights of a file that ``digits_classifier_weights`` made.

    Raises:
        CheckpointError: The file is missing, cut short, or holds something else.
    """
    network = DigitsClassifier()
    try:
        network.load_state_dict(load_tensors(path)[0])
    except RuntimeError as error:
        raise CheckpointError(
            f"{path} does not hold the digits classifier; delete it, and it is trained again"
        ) from error
    return network


def _train() -> tuple[DigitsClassifier, float]:
    """The trained network and the share of its training digits that it names rightly."""
    from sklearn.datasets import load_digits

    images = load_dataset("digits").images
    labels = torch.from_numpy(load_digits().target)
    with _one_thread():
        with seeded(_CPU, _SEED, Stream.CLASSIFIER):
            network = DigitsClassifier()
        optimizer = torch.optim.Adam(network.parameters(), lr=_LR)
        for epoch in range(_EPOCHS):
            order = torch.randperm(
                len(images), generator=generator(_SEED, Stream.CLASSIFIER, epoch)
            )
            for batch in torch.split(order, _BATCH):
                optimizer.zero_grad(set_to_none=True)
                loss = F.cross_entropy(network.classes(network(images[batch])), labels[batch])
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        with torch.no_grad():
            guesses = network.classes(network(images)).argmax(dim=1)
    return network, (guesses == labels).double().mean().item()


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Sums in one order, so that the weights do not depend on the number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
