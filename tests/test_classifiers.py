"""Small classifiers: their weights by a plain loop, the sizes they take, what they refuse."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bdense.data.datasets import load_dataset, to_float
from bdense.errors import CheckpointError, InputError, ShapeError
from bdense.metrics.classifiers import (
    RECIPES,
    Classifier,
    Recipe,
    classifier_checkpoint,
    load_classifier,
)
from bdense.models.store import load_tensors, save_tensors
from bdense.randomness import Stream, derive_seed, generator
from tests.features import random_images


@pytest.fixture
def brief(monkeypatch) -> str:
    """One pass over the digits instead of twelve."""
    recipe = Recipe(data="digits", side=8, epochs=1)
    monkeypatch.setitem(RECIPES, "brief-classifier", recipe)
    return "brief-classifier"


def plain_loop_over_digits(epochs: int) -> nn.Sequential:
    """The digits classifier as it was before there was a second one."""
    digits = load_dataset("digits")
    torch.manual_seed(derive_seed(0, Stream.CLASSIFIER))
    network = nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.SiLU()),
        *(nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.SiLU(), nn.Flatten()),
        *(nn.Linear(1024, 64), nn.SiLU(), nn.Linear(64, 10)),
    )
    adam = torch.optim.Adam(network.parameters(), lr=1e-3)
    for epoch in range(epochs):
        order = torch.randperm(1797, generator=generator(0, Stream.CLASSIFIER, epoch))
        for batch in order.split(64):
            grey = digits.images[batch].float() / 127.5 - 1
            adam.zero_grad()
            F.cross_entropy(network(grey), digits.labels[batch]).backward()
            adam.step()
    return network


def test_the_weights_are_those_of_a_plain_loop(cache, brief):
    """Bit for bit: an extractor's hash stands beside every distance."""
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(1)
    expected = plain_loop_over_digits(epochs=1)
    torch.set_num_threads(threads)
    torch.set_rng_state(state)
    path = classifier_checkpoint(brief, cache)
    assert (torch.get_num_threads(), torch.get_rng_state().tolist()) == (threads, state.tolist())
    tensors, metadata = load_tensors(path)
    assert list(tensors) == [
        *("classes.bias", "classes.weight", "conv0.bias", "conv0.weight"),
        *("conv1.bias", "conv1.weight", "hidden.bias", "hidden.weight"),
    ]
    for place, name in ((0, "conv0"), (2, "conv1"), (5, "hidden"), (7, "classes")):
        assert torch.equal(tensors[f"{name}.weight"], expected[place].weight)
        assert torch.equal(tensors[f"{name}.bias"], expected[place].bias)
    digits = load_dataset("digits")
    right = expected(to_float(digits.images)).argmax(dim=1) == digits.labels
    assert metadata == {
        "kind": brief,
        "train_accuracy": pytest.approx(right.double().mean().item(), abs=1e-3),
        "epochs": 1,
    }
    assert path.name == "brief-classifier-1.safetensors"


def test_features_are_what_the_last_layer_sees(cache, brief):
    path = classifier_checkpoint(brief, cache)
    network = load_classifier(path)
    digits = load_dataset("digits")
    features = network(digits.images)
    assert features.shape == (1797, Classifier.DIM) == (1797, 64)
    right = network.classes(features).argmax(dim=1) == digits.labels
    assert right.double().mean().item() == load_tensors(path)[1]["train_accuracy"] > 0.7
    coloured = digits.images[:5].expand(-1, 3, -1, -1)
    assert torch.equal(network(coloured), network(digits.images[:5]))


@pytest.mark.parametrize("side", [28, 31, 17])
def test_smaller_images_are_padded_as_the_training_images_were(side):
    network = Classifier("fashion", 32, 10)
    images = random_images(3, channels=1, side=side)
    padded = torch.zeros(3, 1, 32, 32, dtype=torch.uint8)
    before = (32 - side) // 2
    padded[:, :, before : before + side, before : before + side] = images
    assert torch.equal(network(images), network(padded))


@pytest.mark.parametrize("shape", [(2, 1, 16, 16), (2, 1, 33, 33), (2, 3, 28, 32)])
def test_other_sizes_are_refused_by_name(shape):
    network = Classifier("fashion-mnist-classifier", 32, 10)
    message = "fashion-mnist-classifier takes .* at most 32 pixels a side, got"
    with pytest.raises(ShapeError, match=message):
        network(torch.zeros(shape, dtype=torch.uint8))


@pytest.mark.parametrize("side", [4, 28, 0])
def test_a_side_is_a_power_of_two(side):
    with pytest.raises(InputError, match=f"odd must have a side of 8, 16, 32, .* got {side}"):
        Classifier("odd", side, 10)


def test_a_set_that_cannot_be_had_leaves_no_weights(cache, monkeypatch):
    monkeypatch.setitem(RECIPES, "none", Recipe(data="folder:/nowhere", side=8, epochs=1))
    with pytest.raises(InputError, match="there is no image folder /nowhere"):
        classifier_checkpoint("none", cache)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


@pytest.mark.parametrize("kind", ["teacher", "digits-classifier"])
def test_a_file_of_something_else_is_refused(tmp_path, kind):
    path = tmp_path / "other.safetensors"
    save_tensors(path, {"classes.bias": torch.zeros(10)}, {"kind": kind})
    with pytest.raises(CheckpointError, match=r"other\.safetensors does not hold a classifier"):
        load_classifier(path)
