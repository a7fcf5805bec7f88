"""Data sets: their bytes, their range, their identity."""

import pytest
import torch

from bdense.data import Dataset, load_dataset
from bdense.errors import InputError, ShapeError


def test_digits_are_the_scans_of_scikit_learn_in_full_range():
    digits = load_dataset("digits")
    assert digits.name == "digits"
    assert digits.images.shape == (1797, 1, 8, 8)
    assert digits.images.dtype == torch.uint8
    # 0..16 become round(v / 16 * 255); the first scan begins 0 0 5 13 9 1 0 0.
    assert digits.images[0, 0, 0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]
    assert sorted(set(digits.images.flatten().tolist())) == [
        *(0, 16, 32, 48, 64, 80, 96, 112, 128, 143, 159, 175, 191, 207, 223, 239, 255)
    ]


def test_the_hash_is_of_the_pixels():
    assert load_dataset("digits").sha256 == load_dataset("digits").sha256
    assert load_dataset("digits").sha256 == (
        "a2c68e1b959d7a317d96f4067f80b7a340ad844652a263506697b73d95cd89c6"
    )


def test_float_images_fill_minus_one_to_one():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1)
    floats = Dataset("tiny", images, "0").float_images()
    assert floats.dtype == torch.float32
    assert floats.flatten().tolist() == pytest.approx([-1.0, -0.6, 1.0], abs=1e-7)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(InputError, match="'digit'; known are digits"):
        load_dataset("digit")


@pytest.mark.parametrize("images", [torch.zeros(2, 1, 8, 8), torch.zeros(2, 8, 8).byte()])
def test_images_are_bytes_with_channels(images):
    with pytest.raises(ShapeError, match=r"give uint8 \[n, C, H, W\]"):
        Dataset("tiny", images, "0")
