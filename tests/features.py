"""Feature extractors made for a test."""

import dataclasses
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from bdense.metrics.extractors import Extractor, load_extractor

CPU = torch.device("cpu")


class ColourMeans(nn.Module):
    """Three features: the mean of each colour."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean(dim=(2, 3))


def scripted(module: nn.Module, folder: Path) -> Extractor:
    """The extractor of a module that is scripted to a file ``features.pt`` first."""
    path = folder / "features.pt"
    torch.jit.save(torch.jit.script(module), path)
    return load_extractor(f"torchscript:{path}", cache=folder, device=CPU)


def random_images(n, channels=3, side=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (n, channels, side, side)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def write_images(folder: Path, images: torch.Tensor) -> Path:
    """A folder of these [B, 3, H, W] bytes, each as a PNG."""
    folder.mkdir()
    for i, pixels in enumerate(images):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    return folder


def counting(extractor: Extractor) -> tuple[Extractor, list[int]]:
    """The same extractor, and a list that gets the batch size of each call of its network."""
    calls: list[int] = []

    class Counted(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            calls.append(len(images))
            return extractor.network(images)

    return dataclasses.replace(extractor, network=Counted()), calls
