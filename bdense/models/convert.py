"""Convert a foreign checkpoint to safetensors, with readable JSON and a model card."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.errors import InputError
from bdense.files import atomic_write, sha256_file
from bdense.models.cards import network_facts, write_card
from bdense.models.public import CHECKPOINTS
from bdense.models.sources import load_model
from bdense.models.store import denoiser_sha256, save_denoiser

_SUFFIX = ".safetensors"


@dataclass(frozen=True, eq=False)
class Conversion:
    """What was found and what was written.

    Attributes:
        facts: About the source and the network, in the order to print them.
        files: The three files written.
    """

    facts: Mapping[str, str]
    files: tuple[Path, ...]

    def lines(self) -> list[str]:
        """Facts and files, a line each."""
        written = f"wrote {', '.join(map(str, self.files))}"
        return [*(f"{key}: {value}" for key, value in self.facts.items()), written]


def convert(source: str | Path, out: Path) -> Conversion:
    """Write a model as safetensors, with a readable .json and a model card beside it.

    Args:
        source: As in ``load_model``.
        out: File to write, ending in ``.safetensors``.

    Raises:
        InputError: ``out`` has another ending, or the source cannot be read.
    """
    out = Path(out)
    if out.suffix != _SUFFIX:
        raise InputError(f"{out} must end in {_SUFFIX}, the format that is written")
    denoiser, found = load_model(source)
    metadata = {"kind": "teacher", **found}
    published = CHECKPOINTS.get(str(source))
    file = Path(source) if published is None else published.path
    if file.is_file():
        metadata["source_sha256"] = sha256_file(file)
    weights = denoiser_sha256(denoiser)
    save_denoiser(out, denoiser, metadata)
    readable = out.with_suffix(".json")
    with atomic_write(readable) as scratch:
        scratch.write_text(readable_json(out.name, denoiser, metadata, weights))
    card = write_card(out, denoiser, metadata)
    return Conversion(_facts(denoiser, metadata, weights), (out, readable, card))


def _facts(denoiser: NetworkDenoiser, metadata: Mapping[str, Any], weights: str) -> dict[str, str]:
    facts = {"source": str(metadata.get("source", metadata["kind"]))}
    if "class" in metadata:
        facts["class"] = str(metadata["class"])
    facts |= network_facts(denoiser)
    if "scheduler" in metadata:
        facts["scheduler"] = str(metadata["scheduler"])
    if "clip_sample" in metadata:
        facts["predictions clipped by the scheduler"] = (
            f"to +-{metadata['clip_sample']:g}; not by this project's solvers"
        )
    if "embedded_source_bytes" in metadata:
        facts["program text in the file"] = (
            f"{metadata['embedded_source_bytes']:,} bytes, not executed"
        )
    facts["licence"] = str(metadata.get("licence", "not known"))
    if "source_sha256" in metadata:
        facts["sha256 of the source"] = metadata["source_sha256"]
    return facts | {"sha256 of architecture and weights": weights}


def readable_json(
    name: str, denoiser: NetworkDenoiser, metadata: Mapping[str, Any], weights: str
) -> str:
    """Readable JSON about a file of weights.

    Args:
        name: Name of the file.
        denoiser: The model in it.
        metadata: The file's metadata.
        weights: Its ``denoiser_sha256``.
    """
    channels, height, width = denoiser.image_shape
    tree = {
        "file": name,
        **metadata,
        "image_shape": [channels, height, width],
        "classes": denoiser.label_dim,
        "parameters": sum(parameter.numel() for parameter in denoiser.parameters()),
        "weights_sha256": weights,
        "architecture": denoiser.describe(),
    }
    return json.dumps(tree, indent=2) + "\n"
