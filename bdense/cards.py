"""Model cards: what a file is, whose terms it carries, and how to draw from it, for people.

The form is the Hugging Face hub's: Markdown with YAML in front.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bdense.denoiser import NetworkDenoiser
from bdense.files import atomic_write
from bdense.sampling import samplers_from
from bdense.solvers import DDIM, Euler

# How a student was made, by its ``method``.
_METHODS = {
    "sfd": "Simple and Fast Distillation (SFD, arXiv 2409.19681)",
    "sfd-bdense": "SFD (arXiv 2409.19681) with dense branch supervision (B-DENSE, "
    "arXiv 2602.15971)",
    "uniform": "SFD (arXiv 2409.19681) with dense branch supervision (B-DENSE, "
    "arXiv 2602.15971), all branches alike",
}
_STEPS = {Euler: "Euler", DDIM: "DDIM"}
# What a student takes over from its teacher.
_INHERITED = ("licence", "citation")


def inherited(teacher: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What a student's metadata take from its teacher's: what the teacher is, and its terms.

    Args:
        teacher: The teacher's metadata.
        name: What the user called the teacher, for one that says nothing of where it is from.
    """
    terms = {key: teacher[key] for key in _INHERITED if key in teacher}
    return {"teacher": teacher.get("source", name), **terms}


def model_card(name: str, denoiser: NetworkDenoiser, metadata: Mapping[str, Any]) -> str:
    """The card of one safetensors file.

    Args:
        name: The file's name.
        denoiser: What it holds.
        metadata: What its header says beside the architecture.

    Returns:
        Markdown.
    """
    student = metadata.get("kind") == "student"
    licence = metadata.get("licence")
    front = {
        # The hub's identifiers are SPDX's in lower case.
        "license": (licence or "unknown").lower(),
        "library_name": "bdense",
        "pipeline_tag": "unconditional-image-generation",
        "tags": "[diffusion, distillation]" if student else "[diffusion]",
    }
    rows = _facts(denoiser, metadata) | (_student_facts(metadata) if student else {})
    return "\n".join(
        [
            "---",
            *(f"{key}: {value}" for key, value in front.items()),
            "---",
            "",
            f"# {name}",
            "",
            _what_it_is(metadata),
            "",
            "| | |",
            "|---|---|",
            *(f"| {key} | {value} |" for key, value in rows.items()),
            "",
            _terms(metadata, student=student),
            "",
            "```sh",
            _sample_command(name, metadata),
            "```",
            "",
        ]
    )


def _what_it_is(metadata: Mapping[str, Any]) -> str:
    if metadata.get("kind") != "student":
        return "A diffusion model: a denoiser D(x; sigma), which can be a teacher."
    method = metadata.get("method")
    by = f", distilled by {_METHODS.get(method, method)}" if method else ""
    return f"A few-step student of a diffusion model{by}."


def write_card(path: Path, denoiser: NetworkDenoiser, metadata: Mapping[str, Any]) -> Path:
    """Write the card of the safetensors file ``path`` beside it, ending in .md; its path."""
    card = card_path(path)
    with atomic_write(card) as scratch:
        scratch.write_text(model_card(Path(path).name, denoiser, metadata))
    return card


def card_path(path: Path) -> Path:
    """Where the card of a file is."""
    return Path(path).with_suffix(".md")


def network_facts(denoiser: NetworkDenoiser) -> dict[str, str]:
    """Network, preconditioning, size, images and classes, for people."""
    description = denoiser.describe()
    channels, height, width = denoiser.image_shape
    parameters = sum(parameter.numel() for parameter in denoiser.parameters())
    options = ", ".join(
        f"{key} {value}"
        for key, value in denoiser.precond.options().items()
        if not isinstance(value, list | None)
    )
    return {
        "network": str(description["network"]),
        "preconditioning": f"{denoiser.precond.name} ({options})",
        "parameters": f"{parameters:,}",
        "images": f"{channels} x {height} x {width}",
        "classes": str(denoiser.label_dim or "none"),
    }


def _facts(denoiser: NetworkDenoiser, metadata: Mapping[str, Any]) -> dict[str, str]:
    facts = network_facts(denoiser)
    for key in ("source", "url", "citation", "scheduler", "data"):
        if key in metadata:
            facts[key] = str(metadata[key])
    return facts


def _student_facts(metadata: Mapping[str, Any]) -> dict[str, str]:
    facts = {key: str(metadata[key]) for key in ("teacher", "method", "study") if key in metadata}
    if "teacher_sha256" in metadata:
        facts["teacher's sha256"] = f"`{metadata['teacher_sha256']}`"
    if "stage" in metadata:
        facts["stage"] = f"{metadata['stage']}: the teacher is a student itself"
    if "weights" in metadata:
        facts["branch weights"] = ", ".join(f"{weight:.4g}" for weight in metadata["weights"])
    if "weighting" in metadata:
        rule = dict(metadata["weighting"])
        settings = ", ".join(f"{key} {value:g}" for key, value in rule.items() if key != "rule")
        facts["branch weights"] += f" at the end, learned by {rule['rule']} ({settings})"
    if "perceptual" in metadata:
        low, high = metadata["perceptual"]["range"]
        facts["perceptual loss"] = (
            f"{metadata['perceptual']['name']} on the last interval, of images in [{low}, {high}]"
        )
    if samplers := samplers_from(metadata):
        sampler, steps = samplers[0], [str(each.num_intervals) for each in samplers]
        facts["network evaluations an image (NFE)"] = ", ".join(str(s.nfe) for s in samplers)
        facts["sampler"] = (
            f"{', '.join(steps)} {_STEPS[type(sampler.solver)]} steps"
            f"{', the first analytical' * sampler.afs}, {sampler.schedule.text()}"
        )
    if "fid" in metadata:
        facts["FID"] = _fid(metadata["fid"])
    return facts


def _fid(fid: Mapping[str, Any]) -> str:
    """Never the number alone."""
    conditions = ", ".join(
        f"{key.replace('_', ' ')} {str(value)[:16]}"
        for key, value in fid.items()
        if key not in ("value", "fid", "seeds") and value is not None
    )
    return f"{fid.get('fid', fid.get('value')):.4g} ({conditions})"


def _terms(metadata: Mapping[str, Any], *, student: bool) -> str:
    licence = metadata.get("licence")
    if licence is None and not student and "data" in metadata:
        return (
            f"Licence: not known, nor is that of its training data, {metadata['data']}. Ask the "
            "makers of the data first."
        )
    if licence is None:
        whose = "the teacher's makers, or whoever trained it," if student else "its makers"
        return f"Licence: not known; nothing that it came with names one. Ask {whose} first."
    of_whom = ", its teacher's: a student is made of its teacher's weights" if student else ""
    return f"Licence: {licence}{of_whom}."


def _sample_command(name: str, metadata: Mapping[str, Any]) -> str:
    # A student has a sampler of its own; a teacher's is the user's choice.
    grid = "" if "sampler" in metadata else " --solver heun --nfe 36 --no-afs"
    return f"bdense sample {name}{grid} --images 64 --out samples.png"
