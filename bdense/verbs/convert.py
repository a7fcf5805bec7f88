"""``bdense convert``: a foreign checkpoint becomes safetensors, readable JSON and a model card."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bdense.command import Force
from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.files import atomic_write, require_output, sha256_file
from bdense.models.card import network_facts, readable_json, write_card
from bdense.models.store import denoiser_sha256, load_stored, other_run, save_denoiser
from bdense.models.zoo import CHECKPOINTS
from bdense.verbs.common import require_model_out
from bdense.verbs.options import ConvertOptions


def convert(own: ConvertOptions, replacing: Force) -> None:
    """Run the verb."""
    source, out = own.source, own.out
    denoiser, found = load_stored(source)
    metadata = {"kind": "teacher", **found, "identity": {"model": denoiser_sha256(denoiser)}}
    file = CHECKPOINTS[source].path if source in CHECKPOINTS else Path(source)
    if file.is_file():
        metadata["source_sha256"] = sha256_file(file)
    require_model_out(
        out,
        force=replacing.force,
        problem=lambda path: other_run(path, metadata["identity"]),
        inputs=[source],
    )
    readable = out.with_suffix(".json")
    require_output(readable, problem=_no_facts, force=replacing.force)
    save_denoiser(out, denoiser, metadata)
    with atomic_write(readable) as scratch:
        scratch.write_text(readable_json(out.name, denoiser, metadata))
    card = write_card(out, denoiser, metadata)
    for key, value in _facts(denoiser, metadata).items():
        print(f"{key}: {value}")
    print(f"wrote {out}, {readable}, {card}")


def _no_facts(path: Path) -> str:
    """Why an existing file does not hold the facts of a model; "" if it does."""
    try:
        known = json.loads(path.read_bytes())
    except ValueError:
        known = None
    ours = isinstance(known, dict) and "weights_sha256" in known
    return "" if ours else "is not a model's description that bdense convert wrote"


def _facts(denoiser: NetworkDenoiser, metadata: Mapping[str, Any]) -> dict[str, str]:
    """What was found, in the order to print it."""
    facts = {"source": str(metadata.get("source", metadata["kind"]))}
    if "class" in metadata:
        facts["class"] = str(metadata["class"])
    facts |= network_facts(denoiser, metadata)
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
    return facts | {"sha256 of architecture and weights": denoiser_sha256(denoiser)}
