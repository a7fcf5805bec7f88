"""Conditions: one-hot classes, and nothing."""

import pytest
import torch

from bdense.data.datasets import Dataset
from bdense.diffusion.conditions import Classes, OneClass, Unconditional, conditions_for
from bdense.errors import InputError
from tests.contracts.conditions import ConditionContract
from tests.networks import tiny_denoiser


@pytest.fixture
def dataset():
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(256, (8, 2, 8, 8), generator=draw, dtype=torch.uint8)
    return Dataset("eight", images, "0" * 64, torch.tensor([0, 1, 2, 3, 0, 1, 2, 3]))


class TestClasses(ConditionContract):
    @pytest.fixture
    def conditions(self):
        return Classes(4)

    @pytest.fixture
    def network(self):
        return tiny_denoiser(label_dim=4)


class TestUnconditional(ConditionContract):
    @pytest.fixture
    def conditions(self):
        return Unconditional()

    @pytest.fixture
    def network(self):
        return tiny_denoiser()


def test_every_class_is_as_likely():
    (labels,) = Classes(4).drawn(0, 0, 4000).arguments().values()
    assert labels.sum(dim=1).tolist() == [1.0] * 4000
    assert all(900 < count < 1100 for count in labels.sum(dim=0).tolist())


def test_one_class_may_be_asked_for():
    same = conditions_for(4, 2)
    assert same == OneClass(4, 2)
    for condition in (same.drawn(0, 0, 2), same.evaluation(0, range(2))):
        assert condition.one_hot.tolist() == [[0.0, 0.0, 1.0, 0.0]] * 2
    with pytest.raises(InputError, match=r"class 4 is not one of the network's 4; .* 0\.\.3"):
        conditions_for(4, 4)
    with pytest.raises(InputError, match="class 0 was asked of an unconditional network"):
        conditions_for(0, 0)


def test_a_data_set_without_labels_is_refused(dataset):
    bare = Dataset("bare", dataset.images, "0" * 64)
    Unconditional().require(bare)
    with pytest.raises(InputError, match="'bare' has no labels"):
        Classes(4).require(bare)
    with pytest.raises(InputError, match="label_dim"):
        Classes(3).require(dataset)
