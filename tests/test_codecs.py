"""Codecs: the contract of each, and what an autoencoder does to latents, written out."""

import pytest
import torch

from bdense.diffusion.codecs import Autoencoder, Pixels
from tests.contracts.codecs import CodecContract
from tests.latent_folders import CODEC
from tests.networks import untrained


@pytest.fixture
def images():
    return torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


class TestPixels(CodecContract):
    @pytest.fixture
    def codec(self):
        return Pixels()

    @pytest.fixture
    def latent_shape(self):
        return 3, 16, 16


class AutoencoderContract(CodecContract):
    @pytest.fixture
    def latent_shape(self):
        return 4, 8, 8

    def test_slices_are_the_whole(self, codec, images):
        one = Autoencoder(codec.model, codec.scaling_factor, codec.shift_factor, slice=1)
        latents = codec.encode(images)
        torch.testing.assert_close(one.encode(images), latents)
        torch.testing.assert_close(one.decode(latents), codec.decode(latents))


class TestVariational(AutoencoderContract):
    @pytest.fixture(params=[0.0, 0.3])
    def codec(self, request):
        diffusers = pytest.importorskip("diffusers")
        model = untrained(lambda: diffusers.AutoencoderKL(**CODEC)).eval()
        return Autoencoder(model, 0.18215, request.param)

    @torch.no_grad()
    def test_latents_are_shifted_and_scaled_means(self, codec, images):
        mean = codec.model.encode(images).latent_dist.mean
        latents = codec.encode(images)
        torch.testing.assert_close(latents, (mean - codec.shift_factor) * 0.18215)
        torch.testing.assert_close(codec.decode(latents), codec.model.decode(mean).sample)


class TestQuantising(AutoencoderContract):
    @pytest.fixture
    def codec(self):
        diffusers = pytest.importorskip("diffusers")
        model = untrained(lambda: diffusers.VQModel(**CODEC, num_vq_embeddings=32)).eval()
        return Autoencoder(model, 1.0)

    @torch.no_grad()
    def test_latents_are_quantised_when_they_are_decoded(self, codec, images):
        latents = codec.encode(images)
        torch.testing.assert_close(latents, codec.model.encode(images).latents)
        quantised = codec.model.quantize(latents)[0]
        assert not torch.allclose(quantised, latents)
        torch.testing.assert_close(codec.decode(latents), codec.decode(quantised))
