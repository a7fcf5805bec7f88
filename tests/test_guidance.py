"""Classifier-free guidance: what is called, and what comes of it."""

import pytest
import torch

from bdense.diffusion.branches import widen_head
from bdense.diffusion.conditions import Classes, ClassLabels, Unconditional
from bdense.diffusion.guidance import calls, guided, null_for
from bdense.errors import InputError, ShapeError
from tests.networks import image, one_hot, tiny_denoiser


@pytest.fixture
def denoiser():
    return tiny_denoiser(label_dim=3, label_dropout=0.2)


NULL = ClassLabels(torch.zeros(1, 3))
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
    student = widen_head(denoiser, 2)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in student.model.get_submodule(student.model.head_name).parameters():
            parameter.normal_()
    labels = one_hot(2, 0, 1)
    found = guided(student.branches, 3.0, NULL)(X, LEVELS, class_labels=labels)
    without, told = student.branches(X, LEVELS), student.branches(X, LEVELS, labels)
    torch.testing.assert_close(found, without + 3 * (told - without), rtol=1e-4, atol=1e-3)


def test_without_a_null_there_is_no_guidance(denoiser):
    assert null_for(1.0, Unconditional()) is None
    for conditions in (Unconditional(), Classes(3)):
        with pytest.raises(InputError, match=r"guidance 7\.5 .* leave guidance at 1"):
            null_for(7.5, conditions)
    with pytest.raises(InputError, match="guidance 2 "):
        guided(denoiser, 2.0, None)


def test_a_call_without_condition_is_refused(denoiser):
    with pytest.raises(InputError, match="class_labels is not given"):
        guided(denoiser, 2.0, NULL)(X, LEVELS)
    with pytest.raises(ShapeError, match="must have the same shape"):
        guided(denoiser, 2.0, NULL)(X, LEVELS, class_labels=torch.zeros(3, 4))
