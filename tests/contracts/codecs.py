"""What every codec promises; subclass it and give ``codec``, ``images`` and ``latent_shape``."""

import json

import torch


class CodecContract:
    """Images to the space that a denoiser works in, and back."""

    def test_shapes_go_there_and_back(self, codec, images, latent_shape):
        latents = codec.encode(images)
        assert latents.shape == (len(images), *latent_shape)
        assert codec.decode(latents).shape == images.shape

    def test_an_image_does_not_depend_on_its_batch(self, codec, images):
        latents = codec.encode(images)
        torch.testing.assert_close(codec.encode(images[2:4]), latents[2:4])
        torch.testing.assert_close(codec.decode(latents[2:4]), codec.decode(latents)[2:4])

    def test_it_moves_and_stays_what_it_is(self, codec, images):
        expected = codec.encode(images)
        moved = codec.to(torch.device("cpu"))
        assert moved.describe() == codec.describe()
        assert torch.equal(moved.encode(images), expected)

    def test_it_describes_itself(self, codec):
        assert json.loads(json.dumps(codec.describe())) == codec.describe()
