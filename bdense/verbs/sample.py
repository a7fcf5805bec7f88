"""``bdense sample``: draw images from a model as one picture."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdense.command import Force
from bdense.data.encoded import embed_prompts
from bdense.data.names import SUFFIXES
from bdense.data.prompts import read_prompts
from bdense.diffusion.codecs import Codec
from bdense.diffusion.conditions import Prompts
from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.diffusion.epd import at_guidance, read_table
from bdense.diffusion.guidance import calls, null_for
from bdense.diffusion.pictures import save_grid
from bdense.diffusion.preconditioning import levels_on, native_schedule
from bdense.diffusion.sampling import Sampler, draw_images, levels_of, samplers_from
from bdense.diffusion.solvers import make_solver
from bdense.diffusion.vp import Levels
from bdense.errors import InputError
from bdense.execution import Execution
from bdense.files import require_output
from bdense.knob_options import spelt_options
from bdense.knobs import KnobError
from bdense.models.diffusers_files import is_hub_id
from bdense.models.latents import (
    drawn_shape,
    draws_latents,
    load_codec,
    load_text_encoder,
    require_own_codec,
)
from bdense.models.store import load_model
from bdense.verbs.common import Progress, chosen_hardware, say_ignored
from bdense.verbs.options import Drawing, Hardware, SampleOptions

_PNG = b"\x89PNG\r\n\x1a\n"
_LEVELS = ("schedule", "rho", "sigma_min", "sigma_max")
_USUAL = {"nfe": 2, "afs": True, "solver": "euler", "order": None, "clip_samples": False}


def sample(
    own: SampleOptions,
    replacing: Force,
    drawing: Drawing,
    execution: Execution,
    hardware: Hardware,
) -> None:
    """Run the verb."""
    device = chosen_hardware(execution, hardware)
    texts = chosen_prompts(drawing.prompts) if own.prompt is None else [own.prompt]
    if own.prompt is not None and drawing.prompts is not None:
        raise KnobError("prompt", "and `prompts` are two sources of prompts; drop one of them")
    require_output(own.out, problem=_no_picture, inputs=[own.model], force=replacing.force)
    if (ending := own.out.suffix.lower()) in SUFFIXES and ending != ".png":
        raise KnobError("out", f"is a PNG picture and must end in .png, got {own.out}")
    drawer = chosen_drawer(own.model, drawing, texts, device, execution)
    save_grid(drawer.draw(own.images, own.seed), own.out, own.columns)
    print(own.out)


def _no_picture(path: Path) -> str:
    """Why an existing file may not be replaced; "" if it is a PNG."""
    with path.open("rb") as file:
        return "" if file.read(len(_PNG)) == _PNG else "is not a PNG picture"


def chosen_prompts(file: str | None) -> list[str]:
    """The prompts of --prompts; none without it.

    Raises:
        InputError: The file holds no prompt.
    """
    try:
        return [] if file is None else read_prompts(file)
    except InputError as error:
        raise KnobError("prompts", str(error)) from error


def conditions_of(
    model: NetworkDenoiser,
    pipeline: str,
    texts: list[str],
    negative: str = "",
    *,
    cache: Path | None = None,
) -> Prompts | None:
    """The prompts as a network's condition; None for one without text.

    Prompts that are too long are cut, and stderr says which. With a cache they are embedded once.

    Raises:
        InputError: There are no prompts for a network that needs them, or the other way round.
    """
    if not model.model.text_dim:
        if texts or negative:
            raise KnobError(
                "prompts" if texts else "negative_prompt",
                "cannot be given to a model that takes no text; leave prompts out",
            )
        return None
    if not texts:
        raise KnobError("prompts", "are needed by a text-conditional model")
    require_pipeline(pipeline)
    encoder = load_text_encoder(pipeline, model.model.text_dim)
    for i in encoder.too_long([*texts, negative]):
        which = f"prompt {i + 1}" if i < len(texts) else "the negative prompt"
        sys.stderr.write(f"{which} is longer than {encoder.length} tokens; the rest is left out\n")
    if cache is None:
        return encoder.prompts(texts, negative)
    show = Progress().counting(len(texts) + 1, "prompts embedded")
    return embed_prompts(
        texts,
        pipeline,
        cache,
        negative=negative,
        encoder=encoder,
        on_prompt=lambda done, _: show(done),
    )


def codec_of(
    model: NetworkDenoiser, metadata: Mapping[str, Any], pipeline: str, device: torch.device
) -> Codec | None:
    """What makes images of a model's latents; None for a model of pixels.

    Raises:
        InputError: There is no autoencoder in the pipeline, or another than that of the latents.
    """
    if not draws_latents(model, metadata):
        return None
    require_pipeline(pipeline)
    require_own_codec(model, metadata, pipeline)
    return load_codec(pipeline).to(device)


def require_pipeline(source: str) -> None:
    """Require a pipeline's folder or hub id."""
    if not Path(source).is_dir() and not is_hub_id(source):
        raise missing_pipeline(source)


def missing_pipeline(model: str) -> KnobError:
    """The error for a model of latents without the pipeline that it is a part of."""
    return KnobError(
        "pipeline",
        f"is needed: {model} draws latents, and autoencoder and text encoder are in its teacher's "
        "folder",
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class Drawer:
    """A model, and the arguments of ``draw_images`` that it draws with.

    Attributes:
        remark: For people, before it draws.
    """

    model: NetworkDenoiser
    sampler: Sampler
    metadata: Mapping[str, Any]
    class_index: int | None
    conditions: Prompts | None
    codec: Codec | None
    batch: int
    remark: str = ""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return drawn_shape(self.model, self.metadata)

    def draw(self, count: int, seed: int, on_image: Callable[[int], None] | None = None) -> Tensor:
        """[count, C, H, W] uint8 images."""
        sys.stderr.write(self.remark)
        return draw_images(
            self.model,
            self.sampler,
            count,
            seed=seed,
            batch=self.batch,
            class_index=self.class_index,
            conditions=self.conditions,
            codec=self.codec,
            on_image=on_image,
        )


def chosen_drawer(
    source: str,
    drawing: Drawing,
    texts: list[str],
    device: torch.device,
    execution: Execution,
    *,
    cache: Path | None = None,
) -> Drawer:
    """A model on its device, with its sampler and condition; prompts as of ``conditions_of``.

    Raises:
        InputError: There is no such model, it has another sampler than the one asked for, or
            prompts or autoencoder are missing.
    """
    model, metadata = load_model(source)
    say_ignored(source, metadata)
    sampler = _chosen_sampler(source, drawing, model, metadata)
    model.require_levels(sampler.schedule)
    conditions = model.conditions_of(drawing.class_)  # refuses a class it does not know
    if not model.model.text_dim:
        null_for(sampler.guidance, conditions)  # refuses guidance that it cannot have
    elif drawing.negative_prompt and sampler.guidance == 1:
        raise KnobError(
            "negative_prompt", "changes nothing at guidance 1; give `guidance`, too, or drop it"
        )
    remark, pipeline = "", drawing.pipeline or source
    if drawing.nfe is None and drawing.epd_table is None and not model.samplers:
        remark = (
            f"{source} is a teacher, and is drawn with {sampler.nfe} network evaluations; "
            "take more by --nfe, such as --nfe 32, to see its best\n"
        )
    drawer = Drawer(
        model=model,
        sampler=sampler,
        metadata=metadata,
        class_index=drawing.class_,
        conditions=conditions_of(model, pipeline, texts, drawing.negative_prompt, cache=cache),
        codec=codec_of(model, metadata, pipeline, device),
        batch=drawing.batch,
        remark=remark,
    )
    model.to(device).execute(execution)
    return drawer


def _chosen_sampler(
    source: str, drawing: Drawing, model: NetworkDenoiser, metadata: Mapping[str, Any]
) -> Sampler:
    """The model's own sampler if it has one, else the one that was asked for."""
    asked = {name: getattr(drawing, name) for name in (*_USUAL, *_LEVELS)}
    asked = {name: value for name, value in asked.items() if value is not None}
    guidance, precond = drawing.guidance, model.precond
    known = samplers_from(metadata)
    native = asked.get("schedule") == "native"
    whose, way_out = f"{source} draws with the sampler it was distilled for", "distil a student"
    if drawing.epd_table is not None:
        if known:
            raise InputError(
                f"{source} draws with the sampler it was distilled for, and --epd-table is for "
                "teachers; drop it, or give the student's teacher"
            )
        known = [read_table(drawing.epd_table, guidance)]
        whose, way_out = f"{drawing.epd_table} holds a table for one sampler", "learn a table"
    if not known:
        usual = _USUAL | {"afs": not draws_latents(model, metadata)}
        usual |= {"solver": "ddim"} if native else {}
        # A model of latents names the levels that it was trained for.
        usual_levels = {} if native else levels_of(metadata, precond)
        levels = {name: value for name, value in usual_levels.items() if name not in asked}
        grid = replace(drawing, **levels).chosen_levels
        chosen = usual | asked | {"guidance": 1.0 if guidance is None else guidance}
        return _sampler(chosen, levels_on(grid, precond))
    if guidance is not None and guidance != known[0].guidance:
        _require_unguided(source, metadata)
        known = [at_guidance(sampler, guidance, source) for sampler in known]
    served = {sampler.nfe: sampler for sampler in known}
    smallest = min(served)
    own = served.get(asked.get("nfe", smallest), served[smallest])
    levels = own.schedule.describe()
    levels.pop("process", None)
    kept = {"nfe": own.nfe, "afs": own.afs, "schedule": levels.pop("kind"), **levels}
    solver = own.solver.describe()
    kept |= {"solver": solver["solver"], "clip_samples": solver.get("clip", False)}
    kept["order"] = solver.get("max_order", own.solver.order)
    if native and own.schedule == native_schedule(precond):
        del asked["schedule"]
    if kept | asked != kept:
        other = {name: value for name, value in asked.items() if kept.get(name) != value}
        *others, largest = map(str, served)
        choices = f"{', '.join(others)} or {largest}" if others else largest
        raise InputError(
            f"{whose} (NFE {choices}), and {spelt_options(other)} asks for another; drop that, "
            f"or {way_out} for it"
        )
    return own


def _require_unguided(source: str, metadata: Mapping[str, Any]) -> None:
    """Refuse guidance of a student that has learned its teacher's."""
    training = metadata.get("training", {})
    learned = training.get("guidance_teacher", 1.0)
    if learned != training.get("guidance_student", 1.0):
        raise KnobError(
            "guidance",
            f"is for a student that was distilled without it, and {source} has learned its "
            f"teacher's {learned:g}; leave it out",
        )


def _sampler(chosen: Mapping[str, Any], schedule: Levels) -> Sampler:
    name, nfe, afs = chosen["solver"], chosen["nfe"], chosen["afs"]
    solver = make_solver(name, order=chosen["order"], clip=chosen["clip_samples"])
    each = calls(chosen["guidance"])
    if nfe % each:
        raise InputError(
            f"--guidance {chosen['guidance']:g} needs {each} evaluations for each prediction, "
            f"which cannot add up to --nfe {nfe}; take --nfe {nfe + 1}"
        )
    num_intervals, rest = divmod(nfe // each + (1 if afs else 0), solver.nfe(1))
    if rest:
        taken, other = ("--afs", "--no-afs") if afs else ("--no-afs", "--afs")
        raise InputError(
            f"{name} needs {each} evaluations an interval, one less in total with "
            f"--afs, which cannot add up to --nfe {nfe} with {taken}; take --nfe {nfe + 1} or "
            f"{other}"
        )
    return Sampler(
        num_intervals=num_intervals,
        afs=afs,
        schedule=schedule,
        solver=solver,
        guidance=chosen["guidance"],
    )
