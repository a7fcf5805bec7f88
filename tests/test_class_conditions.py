"""Conditions: one-hot classes, and nothing; guidance: what is called, and what comes of it."""

import pytest
import torch

from bdense.data.datasets import Dataset
from bdense.diffusion.conditions import (
    Classes,
    OneClass,
    Prompts,
    TensorCondition,
    Unconditional,
)
from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.diffusion.guidance import calls, guided, null_for
from bdense.diffusion.preconditioning import DDPM
from bdense.errors import InputError, ShapeError
from bdense.networks.diffusers_unet import DiffusersTextUNet
from tests.contracts.conditions import ConditionContract
from tests.contracts.networks import three_branches
from tests.networks import TEXT_UNET, image, one_hot, tiny_denoiser, untrained


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


class TestClassesWithNull(TestClasses):
    @pytest.fixture
    def conditions(self):
        return Classes(4, has_null=True)

    @pytest.fixture
    def network(self):
        return tiny_denoiser(label_dim=4, label_dropout=0.1)

    def test_a_network_that_was_trained_with_hidden_classes_knows_none(self, network):
        assert network.conditions == Classes(4, has_null=True)
        assert tiny_denoiser(label_dim=4).conditions.null() is None


class TestPrompts(ConditionContract):
    @pytest.fixture
    def conditions(self):
        draw = torch.Generator().manual_seed(0)
        return Prompts(torch.randn(5, 3, 6, generator=draw), torch.randn(1, 3, 6, generator=draw))

    @pytest.fixture
    def network(self):
        pytest.importorskip("diffusers")
        return NetworkDenoiser(untrained(lambda: DiffusersTextUNet(TEXT_UNET)), DDPM()).eval()

    def is_of(self, network, conditions):
        with pytest.raises(InputError, match="give prompts"):
            network.conditions.drawn(0, 0, 1)

    def test_a_data_set_tells_its_images(self, conditions, dataset):
        for call in (conditions.require, lambda data: conditions.of(data, torch.tensor([0]))):
            with pytest.raises(InputError, match="cannot be the captions"):
                call(dataset)

    def test_an_evaluated_image_has_the_prompt_of_its_number(self, conditions):
        found = conditions.evaluation(7, range(3, 8)).values
        assert torch.equal(found, conditions.embeddings[[3, 4, 0, 1, 2]])

    def test_every_prompt_is_as_likely(self, conditions):
        rows = conditions.drawn(0, 0, 5000).values
        for prompt in conditions.embeddings:
            assert 900 < int((rows == prompt).flatten(1).all(1).sum()) < 1100

    def test_other_prompts_are_another_condition(self, conditions):
        other = Prompts(conditions.embeddings.flip(0), conditions.empty)
        assert other.describe() != conditions.describe()
        assert Prompts(conditions.embeddings).describe() != conditions.describe()
        assert Prompts(conditions.embeddings.clone(), conditions.empty).describe() == (
            conditions.describe()
        )

    def test_prompts_that_do_not_fit_together_are_refused(self, conditions):
        with pytest.raises(InputError, match=r"one or more, got \[0, 3, 6\]"):
            Prompts(conditions.embeddings[:0])
        with pytest.raises(InputError, match=r"\[1, 3, 6\] .* got \[1, 2, 6\]"):
            Prompts(conditions.embeddings, conditions.empty[:, 1:])


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
    same = tiny_denoiser(label_dim=4).conditions_of(2)
    assert same == OneClass(4, 2)
    for condition in (same.drawn(0, 0, 2), same.evaluation(0, range(2))):
        assert condition.values.tolist() == [[0.0, 0.0, 1.0, 0.0]] * 2
    with pytest.raises(InputError, match=r"class 4 is not one of the network's 4; .* 0\.\.3"):
        OneClass(4, 4)
    with pytest.raises(InputError, match="class 0 was asked of an unconditional network"):
        tiny_denoiser().conditions_of(0)


# ---- guidance ----


@pytest.fixture
def denoiser():
    return tiny_denoiser(label_dim=3, label_dropout=0.2)


NULL = TensorCondition("class_labels", torch.zeros(1, 3))
X, LEVELS = image(), torch.tensor([0.1, 1.0, 20.0])


@pytest.mark.parametrize("sigma", [LEVELS, torch.tensor(2.0)])
@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.5, 1.0, 7.5])
def test_it_mixes_two_predictions_in_one_call(denoiser, scale, sigma):
    labels = one_hot(2, 0, 1)
    batches = []
    denoiser.model.register_forward_hook(lambda module, inputs, out: batches.append(len(out)))
    found = guided(denoiser, scale, NULL)(X, sigma, class_labels=labels)
    assert batches == [3 * calls(scale)]
    without, told = denoiser(X, sigma), denoiser(X, sigma, labels)
    torch.testing.assert_close(found, without + scale * (told - without), rtol=1e-4, atol=1e-4)


def test_every_branch_is_guided(denoiser):
    student = three_branches(denoiser)
    labels = one_hot(2, 0, 1)
    found = guided(student.branches, 3.0, NULL)(X, LEVELS, class_labels=labels)
    without, told = student.branches(X, LEVELS), student.branches(X, LEVELS, labels)
    torch.testing.assert_close(found, without + 3 * (told - without), rtol=1e-4, atol=1e-3)


def test_without_a_null_there_is_no_guidance(denoiser):
    assert null_for(1.0, Unconditional()) is None
    for conditions in (Unconditional(), Classes(3)):
        with pytest.raises(InputError, match=r"guidance 7\.5 .* leave it at 1"):
            null_for(7.5, conditions)
    with pytest.raises(InputError, match="guidance 2 "):
        guided(denoiser, 2.0, None)


def test_a_call_without_condition_is_refused(denoiser):
    with pytest.raises(InputError, match="class_labels is not given"):
        guided(denoiser, 2.0, NULL)(X, LEVELS)
    with pytest.raises(ShapeError, match="must have the same shape"):
        guided(denoiser, 2.0, NULL)(X, LEVELS, class_labels=torch.zeros(3, 4))
