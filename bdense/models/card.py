"""Model cards (Markdown with YAML in front, as on the Hugging Face hub) and readable JSON."""

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.diffusion.sampling import SETUP, measured_samplers
from bdense.diffusion.solvers import DDIM
from bdense.files import atomic_write
from bdense.models.diffusers_files import is_hub_id
from bdense.models.latents import draws_latents, known_shape
from bdense.models.store import denoiser_sha256
from bdense.weights.space import by_interval

# Metadata that a student inherits from its teacher.
_INHERITED = ("licence", "citation", "data", "codec", "condition")
# Metadata of any model that its card repeats.
_KNOWN = ("source", "url", "citation", "scheduler", "data")
# Keys of a table of FIDs that always get a column, and the columns' titles.
_COLUMNS = {"steps": "steps", "nfe": "NFE", "arm": "arm", "fid": "FID"}
_COLUMNS |= {"std_err": "standard error", "n": "n"}
_TITLES = {"euler": "Euler", "ddim": "DDIM", "epd": "EPD"}
HOW_TO_SAMPLE = "## How to sample"
_FIRST = "---\nlicense: "  # each card begins so
_PYTHON = """\
import bdense

model, metadata = bdense.load_model({name})
sampler = bdense.samplers_from(metadata)[0]{which}
{parts}images = bdense.draw_images(model, sampler, 64, seed=0{given})  # uint8 [64, C, H, W]
bdense.save_grid(images, "samples.png")"""
_PIPELINE = """\
import torch
from diffusers import {loader}

pipeline = {loader}.from_pretrained({arguments})
images = pipeline(
    {settings}, generator=torch.manual_seed(0)
).images"""
_LORA = """\
import sys

import torch
from diffusers import DiffusionPipeline

folder = {name}
sys.path.insert(0, f"{{folder}}/scheduler")
from student_scheduler import StudentScheduler

pipeline = DiffusionPipeline.from_pretrained({teacher})
pipeline.load_lora_weights(folder)
pipeline.scheduler = StudentScheduler.from_pretrained(f"{{folder}}/scheduler")
images = pipeline(
    {settings}, generator=torch.manual_seed(0)
).images"""
# Of the pipelines whose scheduler is a file in their folder.
_OWN_SCHEDULER = (
    "Its scheduler, `scheduler/student_scheduler.py`, takes the student's own steps. It is a part "
    "of this folder and not of diffusers, which runs it only with `trust_remote_code=True`; read "
    "it first."
)
_FOLDER_OF_TEACHER = "FOLDER_OF_TEACHER"
# Of students of text that have no prompts of their own.
EXAMPLE_PROMPTS = ("a photo of a cat", "a photo of a dog")
_NO_CHECKER = "There is no safety checker: add one where others can ask for images."


def inherited(teacher: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A student's metadata about its teacher: source (else ``name``), licence, data."""
    terms = {key: teacher[key] for key in _INHERITED if key in teacher}
    return {"teacher": teacher.get("source", name), **terms}


def model_card(name: str, denoiser: NetworkDenoiser, metadata: Mapping[str, Any]) -> str:
    """The card, in Markdown, of the safetensors file ``name``."""
    options = _pipeline_option(metadata) + _prompts_option(metadata)
    command = _sample_command(name, metadata, options)
    return _card(name, denoiser, metadata, _fenced("sh", command))


def folder_card(
    name: str,
    denoiser: NetworkDenoiser,
    metadata: Mapping[str, Any],
    *,
    pictures: Sequence[str] = (),
    extra: str = "",
    prompts: Sequence[str] = EXAMPLE_PROMPTS,
    has_pipeline: bool = False,
) -> str:
    """The card, in Markdown, of the folder ``name`` with a student and its own sampler.

    Args:
        metadata: Its metadata; ``fid_table``, a list of rows, becomes a table.
        pictures: Names of picture files in the folder.
        prompts: Examples, for a student of text.
        has_pipeline: Whether the student's diffusers pipeline is in the folder.
    """
    _, *others = (str(sampler.nfe) for sampler in measured_samplers(metadata))
    which = f"  # the others: NFE {', '.join(others)}" if others else ""
    place = json.dumps(name if has_pipeline else _place_of_pipeline(metadata))
    parts = given = prompt = ""
    if metadata.get("condition") == "text":
        parts += f"prompts = bdense.load_text_encoder({place}).prompts({list(prompts)!r})\n"
        given += ", conditions=prompts"
        prompt = f" --prompt {shlex.quote(prompts[0])}"
    if "codec" in metadata:
        parts += f"codec = bdense.load_codec({place})\n"
        given += ", codec=codec"
    python = _PYTHON.format(name=json.dumps(name), which=which, parts=parts, given=given)
    pipeline = "" if has_pipeline else _pipeline_option(metadata)
    verify = f"bdense verify {shlex.quote(name)}{pipeline}{_prompts_option(metadata)}"
    return _card(
        name,
        denoiser,
        metadata,
        HOW_TO_SAMPLE,
        _fenced("sh", _sample_command(name, metadata, pipeline + prompt)),
        _fenced("python", python),
        f"Replace `{_FOLDER_OF_TEACHER}` by the folder of the teacher's pipeline, which has the "
        "autoencoder." * (_FOLDER_OF_TEACHER in pipeline),
        f"`{verify}` measures its FID again." * (SETUP in metadata),
        *(f"![{Path(picture).stem}]({picture})" for picture in pictures),
        *_fid_section(metadata),
        extra.strip(),
    )


def pipeline_card(
    name: str,
    denoiser: NetworkDenoiser,
    metadata: Mapping[str, Any],
    call: Mapping[str, Any],
    pipeline: str,
    example: Mapping[str, Any],
    *,
    lora: bool,
) -> str:
    """The card, in Markdown, of the folder ``name`` that diffusers loads without bdense.

    Args:
        metadata: Its metadata, with ``lora`` the ``teacher`` among them.
        call: Arguments of the pipeline that draw as the student was measured.
        pipeline: diffusers' class of it.
        example: Arguments of a call that draws images.
        lora: Whether the folder has the student as adapters of its teacher.
    """
    place, settings = json.dumps(name), _settings(example)
    guided = metadata.get(SETUP, {}).get("guidance") is not None
    reason = "so its FID was measured" if guided else "it was distilled for that"
    notes = [f"Call it with `{_settings(call)}`: {reason}."]
    if lora:
        teacher = json.dumps(str(metadata["teacher"]))
        python = _LORA.format(name=place, teacher=teacher, settings=settings)
        notes[0] += (
            f" The adapters are for {teacher} only, in float32. The scheduler, which takes the "
            "student's own steps, is a part of this folder, not of diffusers; read "
            "`scheduler/student_scheduler.py` before you run it."
        )
    elif pipeline == "DDIMPipeline":
        python = _PIPELINE.format(loader=pipeline, arguments=place, settings=settings)
    else:
        arguments = f"{place}, trust_remote_code=True"
        python = _PIPELINE.format(
            loader="DiffusionPipeline", arguments=arguments, settings=settings
        )
        notes.append(_OWN_SCHEDULER)
        if metadata.get("condition") == "text":
            notes.append(_NO_CHECKER)
    return _card(
        name,
        denoiser,
        metadata,
        HOW_TO_SAMPLE,
        _fenced("python", python),
        *notes,
        *_fid_section(metadata),
        library="diffusers",
        tags=["lora"] * lora,
    )


def _settings(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in arguments.items())


def _card(
    name: str,
    denoiser: NetworkDenoiser,
    metadata: Mapping[str, Any],
    *sections: str,
    library: str = "bdense",
    tags: Sequence[str] = (),
) -> str:
    """The common beginning of every card, then the given sections without empty ones."""
    student = metadata.get("kind") == "student"
    licence = metadata.get("licence")
    teacher = str(metadata.get("teacher", ""))
    front = {
        # The hub's identifiers are SPDX's in lower case.
        "license": (licence or "unknown").lower(),
        **({"base_model": teacher} if student and is_hub_id(teacher) else {}),
        **({"base_model_relation": "adapter"} if "lora" in tags else {}),
        "library_name": library,
        "pipeline_tag": pipeline_tag(metadata),
        "tags": f"[{', '.join(['diffusion', *['distillation'] * student, *tags])}]",
    }
    what = "A diffusion model: a denoiser D(x; sigma), which can be a teacher."
    if student:
        # Files of older versions have only the method's name.
        paper = metadata.get("paper", metadata.get("method"))
        what = "A few-step student of a diffusion model" + f", distilled by {paper}" * bool(paper)
        if len(metadata.get("weights", ())) > 1:
            what += " with dense branch supervision (B-DENSE, arXiv 2602.15971)"
        what += "."
    known = {key: str(metadata[key]) for key in _KNOWN if key in metadata}
    rows = (
        network_facts(denoiser, metadata) | known | (_student_facts(metadata) if student else {})
    )
    blocks = [
        "\n".join(["---", *(f"{key}: {value}" for key, value in front.items()), "---"]),
        f"# {name}",
        what,
        _table(["", ""], rows.items()),
        _terms(metadata, student=student),
        *filter(None, sections),
    ]
    return "\n\n".join(blocks) + "\n"


def pipeline_tag(metadata: Mapping[str, Any]) -> str:
    """The task on the Hugging Face hub."""
    is_text = metadata.get("condition") == "text"
    return "text-to-image" if is_text else "unconditional-image-generation"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(cells: Iterable[str]) -> str:
        return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)

    return "\n".join([line(heads), "|" + "---|" * len(heads), *map(line, rows)])


def _fenced(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"


def _fid_section(metadata: Mapping[str, Any]) -> list[str]:
    """The table of FIDs; conditions that all rows share are listed below it."""
    rows: Sequence[Mapping[str, Any]] = metadata.get("fid_table", ())
    keys = dict.fromkeys(key for row in rows for key in row if row[key] is not None)
    if not keys:
        return []
    shared = {
        key: rows[0].get(key)
        for key in keys
        if key not in _COLUMNS and all(row.get(key) == rows[0].get(key) for row in rows)
    }
    columns = [key for key in _COLUMNS if key in keys]
    columns += [key for key in keys if key not in _COLUMNS and key not in shared]
    heads = [_COLUMNS.get(key, _words(key)) for key in columns]
    table = _table(heads, [[_cell(key, row.get(key)) for key in columns] for row in rows])
    conditions = ", ".join(f"{_words(key)} {_cell(key, value)}" for key, value in shared.items())
    return ["## FID", table, f"All with {conditions}." if conditions else ""]


def _cell(key: str, value: Any) -> str:  # noqa: ANN401  of JSON
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.2g}" if key == "std_err" else f"{value:.4g}"
    # The start of a digest identifies it; a bar would end the cell.
    return str(value)[: 16 if key.endswith("sha256") else None].replace("|", "\\|")


def _words(key: str) -> str:
    return key.replace("_", " ")


def write_card(path: Path, denoiser: NetworkDenoiser, metadata: Mapping[str, Any]) -> Path:
    """Write the card of the safetensors file ``path`` beside it, as .md; returns its path."""
    path = Path(path)
    card = path.with_suffix(".md")
    with atomic_write(card) as scratch:
        scratch.write_text(model_card(path.name, denoiser, metadata))
    return card


def no_card(path: Path) -> str:
    """Why an existing file is not a card that ``write_card`` wrote; "" if it is."""
    with path.open("rb") as file:
        ours = file.read(len(_FIRST)) == _FIRST.encode()
    return "" if ours else "is not a model card that bdense wrote"


def readable_json(name: str, denoiser: NetworkDenoiser, metadata: Mapping[str, Any]) -> str:
    """JSON for people and scripts about the weights file ``name``: its metadata and network."""
    tree = {
        "file": name,
        **metadata,
        **{f"{what}_shape": list(shape) for what, shape in _shapes(denoiser, metadata).items()},
        "classes": denoiser.label_dim,
        "parameters": sum(parameter.numel() for parameter in denoiser.parameters()),
        "weights_sha256": denoiser_sha256(denoiser),
        "architecture": denoiser.describe(),
    }
    return json.dumps(tree, indent=2) + "\n"


def _shapes(
    denoiser: NetworkDenoiser, metadata: Mapping[str, Any]
) -> dict[str, tuple[int, int, int]]:
    """(C, H, W) of images, where known, and of latents, where it draws those."""
    own: dict[str, tuple[int, int, int]] = {}
    if draws_latents(denoiser, metadata):
        own["latent"] = denoiser.image_shape
    images = known_shape(denoiser, metadata)
    return own if images is None else own | {"image": images}


def network_facts(denoiser: NetworkDenoiser, metadata: Mapping[str, Any]) -> dict[str, str]:
    """Network, preconditioning, size, images and classes, as texts."""
    parameters = sum(parameter.numel() for parameter in denoiser.parameters())
    options = ", ".join(
        f"{key} {value}"
        for key, value in denoiser.precond.options().items()
        if not isinstance(value, list | None)
    )
    return {
        "network": str(denoiser.describe()["network"]),
        "preconditioning": f"{denoiser.precond.name} ({options})",
        "parameters": f"{parameters:,}",
        **{
            f"{what}s": " x ".join(map(str, shape))
            for what, shape in _shapes(denoiser, metadata).items()
        },
        "classes": str(denoiser.label_dim or "none"),
    }


def _student_facts(metadata: Mapping[str, Any]) -> dict[str, str]:
    facts = {key: str(metadata[key]) for key in ("teacher", "method", "study") if key in metadata}
    if "teacher_sha256" in metadata:
        facts["teacher's sha256"] = f"`{metadata['teacher_sha256']}`"
    if "stage" in metadata:
        facts["stage"] = f"{metadata['stage']}: its teacher is a student"
    if "seeds" in metadata:
        facts["seeds"] = ", ".join(f"{name} {seed}" for name, seed in metadata["seeds"].items())
    if "weights" in metadata:
        rows = by_interval(metadata["weights"])
        facts["branch weights"] = "; ".join(", ".join(f"{w:.4g}" for w in row) for row in rows)
        facts["branch weights"] += ", by interval" * (len(rows) > 1)
    if "weighting" in metadata:
        rule = dict(metadata["weighting"])
        settings = ", ".join(f"{key} {value:g}" for key, value in rule.items() if key != "rule")
        facts["branch weights"] += f" at the end, learned by {rule['rule']} ({settings})"
    if "coefficients" in metadata:
        facts["branches combined by"] = ", ".join(f"{c:.4g}" for c in metadata["coefficients"])
    training = metadata.get("training", {})
    scales = [training.get(f"guidance_{who}", 1.0) for who in ("teacher", "student")]
    if scales != [1, 1]:
        facts["guidance in training"] = "teacher {:g}, student {:g}".format(*scales)
    if rank := training.get("lora_rank"):
        facts["trained weights"] = f"adapters of rank {rank} (LoRA), and the head"
    if "perceptual" in metadata:
        low, high = metadata["perceptual"]["range"]
        facts["perceptual loss"] = (
            f"{metadata['perceptual']['name']} on the last interval, images in [{low}, {high}]"
        )
    if samplers := measured_samplers(metadata):
        sampler, steps = samplers[0], [str(each.num_intervals) for each in samplers]
        name = sampler.solver.name
        facts["network evaluations an image (NFE)"] = ", ".join(str(s.nfe) for s in samplers)
        if sampler.sequential_nfe != sampler.nfe:
            facts["network calls one after another"] = str(sampler.sequential_nfe)
        if table := sampler.solver.text():
            facts["learned numbers of its steps"] = table
        facts["sampler"] = (
            f"{', '.join(steps)} {_TITLES.get(name, name)} steps"
            f"{', the first analytical' * sampler.afs}, {sampler.schedule.text()}"
            f"{f', guidance {sampler.guidance:g}' * (sampler.guidance != 1)}"
            f"{', predictions clipped to [-1, 1]' * (sampler.solver == DDIM(clip=True))}"
        )
    if (fid := metadata.get("fid")) is not None:
        conditions = ", ".join(
            f"{_words(key)} {_cell(key, value)}"
            for key, value in fid.items()
            if key not in ("value", "fid", "noise", "effects", "seeds", "prompts")
            and value is not None
        )
        if (prompts := fid.get("prompts")) is not None:
            conditions += f", {prompts['count']} prompts of {prompts['file']}"
            conditions += f", prompts sha256 {_cell('sha256', prompts['sha256'])}"
        noise = f" +- {fid['noise']:.2g}" if "noise" in fid else ""
        facts["FID"] = f"{fid.get('fid', fid.get('value')):.4g}{noise} ({conditions})"
    if (clip := metadata.get("clip_score")) is not None:
        facts["CLIP score"] = (
            f"{clip['value']:.2f} +- {clip['noise']:.2g} ({clip['images']} images, "
            f"{clip['prompts']} prompts, {clip['extractor']} {clip['extractor_sha256'][:8]})"
        )
    return facts


def _terms(metadata: Mapping[str, Any], *, student: bool) -> str:
    licence = metadata.get("licence")
    if licence is None and not student and "data" in metadata:
        return (
            "Licence: not known, and neither is that of its training data, "
            f"{metadata['data']}. Ask the makers of the data first."
        )
    if licence is None:
        whose = "the makers of its teacher" if student else "its makers"
        return f"Licence: not known; none came with it. Ask {whose} first."
    of_whom = ", its teacher's: a student is made from its teacher's weights" if student else ""
    return f"Licence: {licence}{of_whom}."


def _sample_command(name: str, metadata: Mapping[str, Any], options: str) -> str:
    # A student has its own sampler; for a teacher the user chooses one.
    grid = "" if "sampler" in metadata else " --solver heun --nfe 36 --no-afs"
    return f"bdense sample {shlex.quote(name)}{grid}{options} --images 64 --out samples.png"


def _pipeline_option(metadata: Mapping[str, Any]) -> str:
    """Of a model of latents, without a pipeline in its folder."""
    return f" --pipeline {_place_of_pipeline(metadata)}" if "codec" in metadata else ""


def _place_of_pipeline(metadata: Mapping[str, Any]) -> str:
    teacher = str(metadata.get("teacher", ""))
    return teacher if is_hub_id(teacher) else _FOLDER_OF_TEACHER


def _prompts_option(metadata: Mapping[str, Any]) -> str:
    """Of a model of text: the prompts of its FID, where that names them."""
    if metadata.get("condition") != "text":
        return ""
    prompts = metadata.get("fid", {}).get("prompts") or {}
    return f" --prompts {shlex.quote(prompts.get('file', 'FILE'))}"
