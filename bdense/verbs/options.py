"""The options of the verbs, each declared once; does not import torch."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from bdense.command import Configs, Force, ReadLater
from bdense.data.names import DATA_SETS
from bdense.data.prompts import PROMPTS
from bdense.diffusion import BATCH, SOLVERS, STOCHASTIC_SOLVERS
from bdense.diffusion.grid_knobs import NativeGridKnobs
from bdense.execution import Execution
from bdense.knob_options import option_names
from bdense.knobs import Knobs, knob, knob_of, knobs_of
from bdense.methods import METHODS
from bdense.metrics.settings import MetricName
from bdense.models.zoo import CHECKPOINTS, REFERENCES
from bdense.verbs.weight_options import WeightOptions, parameter_options

_MODEL = (
    "a safetensors file, a pickle of EDM or SFD, a folder or hub id (OWNER/NAME) of bdense or in "
    "diffusers' format, or the name of a public checkpoint, which is downloaded (`bdense convert "
    "--help` lists the names)"
)
_EXTRACTORS = (
    "inception[:FILE], dinov2[:FILE], torchscript:FILE (uint8 [B,3,H,W] to [B,d]; "
    "it is a program, which runs: trust its source), "
    "digits-classifier, fashion-mnist-classifier or cifar10-classifier[:FILE]"
)
# Images of a FID, as papers count them.
IMAGES = 50_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware(Knobs):
    """Where a verb computes."""

    heading: ClassVar[str] = "hardware"

    device: Literal["auto", "cpu", "cuda", "mps"] = knob(
        "auto",
        "where to compute; auto: on a CUDA GPU if there is one; mps: on an Apple GPU, for models "
        "that need no float64 there, such as EDM's",
    )
    threads: int | None = knob(None, "CPU threads", low=1, high=1024, none="one for each core")


@dataclass(frozen=True, slots=True, kw_only=True)
class Logging(Knobs):
    """What records a training."""

    log: tuple[str, ...] = knob(
        (),
        "record losses, weights and FIDs by a tracker: tensorboard:DIR, wandb[:PROJECT], "
        "mlflow[:URI], or one of another package",
        metavar="NAME[:PLACE]",
        form="repeated",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherOptions(Knobs):
    """``bdense teacher``, beside the model and its ``TeacherConfig``."""

    data: str = knob("digits", f"data set: {DATA_SETS}")
    out: Path = knob(help="safetensors file to write", metavar="FILE")
    conditional: bool = knob(False, "make it class-conditional, by the labels of the data set")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions(Knobs):
    """The network of ``bdense teacher`` and its prediction."""

    heading: ClassVar[str] = "model"

    channels: int = knob(24, "channels at full resolution", low=1)
    mult: tuple[int, ...] = knob(
        (1, 2),
        "channels of each level, from full resolution down, in multiples of --channels",
        low=1,
    )
    blocks: int = knob(1, "residual blocks in each level", low=1)
    attention: tuple[int, ...] = knob(
        (),
        "sides in pixels of the levels whose blocks have self-attention; the lowest level always "
        "has it",
        low=1,
        metavar="SIDE",
    )
    dropout: float = knob(0.0, "dropout probability, in training only", low=0, high=1)
    precond: Literal["edm", "cosine", "ddpm"] = knob(
        "edm",
        "noise process: edm's levels, or a variance-preserving one, which progressive "
        "distillation needs: cosine, or ddpm with T discrete times",
    )
    prediction: Literal["epsilon", "sample", "v_prediction"] | None = knob(
        None,
        "what the network predicts, with --precond cosine or ddpm: noise, image or v",
        none="v_prediction with cosine, epsilon with ddpm",
    )
    # The last beta is 20 / T, and below 1.
    timesteps: int | None = knob(
        None,
        "number T of ddpm's times; its betas, 0.0001 to 0.02, are scaled by 1000 / T, so that any "
        "T ends in noise",
        low=21,
        high=100_000,
        metavar="T",
        none="1000",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing(NativeGridKnobs):
    """How a model draws images; None: as the student was distilled."""

    heading: ClassVar[str] = "sampling"

    nfe: int | None = knob(
        None,
        "network evaluations an image",
        low=1,
        none="a student's own, the lowest of several, else 2",
    )
    afs: bool | None = knob(
        None,
        "analytical first step: one more interval for the same NFE",
        none="a student's own, else false for latents, true for pixels",
    )
    solver: str | None = knob(
        None,
        "solver that a teacher draws with",
        choices=(*SOLVERS, *STOCHASTIC_SOLVERS),
        none="euler; ddim with --schedule native",
    )
    order: int | None = knob(None, "order of a solver that has several", low=1, none="the highest")
    epd_table: Path | None = knob(
        None,
        "table of solver epd, as `bdense distill --method epd` writes it, with its levels, steps "
        "and afs",
        metavar="FILE",
        none="none: the midpoint of each step",
    )
    clip_samples: bool | None = knob(
        None,
        "clamp ddim's predictions to [-1, 1]",
        none="a student's own, else false",
    )
    class_: int | None = knob(
        None,
        "class of all images, counted from 0, of a conditional model",
        low=0,
        none="a random one for each",
    )
    guidance: float | None = knob(
        None,
        "classifier-free guidance, of a model with a null condition; where it is not 1 or 0, each "
        "prediction costs two network evaluations",
        none="a student's own, else 1",
    )
    prompts: str | None = knob(
        None,
        f"{PROMPTS}: image i has prompt i, from the start again after the last",
        metavar="FILE",
    )
    negative_prompt: str = knob(
        "", "what guidance leads away from, in place of the empty prompt", metavar="TEXT"
    )
    pipeline: str | None = knob(
        None,
        "folder or hub id in diffusers' format with autoencoder and text encoder, of a student of "
        "latents",
        none="MODEL",
    )
    batch: int = knob(BATCH, "images drawn at a time", low=1)

    def __post_init__(self) -> None:
        Knobs.__post_init__(self)
        _ = self.chosen_levels  # which refuses what does not fit together


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOptions(Knobs):
    """``bdense sample``."""

    model: str = knob(help=_MODEL, metavar="MODEL", form="positional")
    images: int = knob(64, "images to draw", low=1)
    columns: int = knob(16, "columns of the grid", low=1)
    prompt: str | None = knob(
        None, "prompt of all images, of a text-conditional model", metavar="TEXT"
    )
    seed: int = knob(0, "seed of every random draw", low=0)
    out: Path = knob(help="PNG file to write", metavar="FILE")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache(Knobs):
    """The folder of cached results."""

    heading: ClassVar[str] = "evaluation"

    cache: Path = knob(
        Path("runs/cache"),
        "folder where statistics of reference sets and small classifiers are cached",
        metavar="DIR",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Features(Cache):
    """The feature extractor."""

    extractor: str = knob("inception", f"feature extractor: {_EXTRACTORS}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation(Cache):
    """How the students of a verb that makes some are measured."""

    extractor: str | None = knob(
        None,
        f"measure the FID of each student against --data, in the features of {_EXTRACTORS}",
        none="measure nothing",
    )
    images: int | None = knob(None, "images to draw for each FID", low=2, none=str(IMAGES))


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillOptions(Knobs):
    """``bdense distill``, for any method."""

    teacher: str = knob(help=_MODEL, metavar="TEACHER", form="positional")
    method: str = knob("sfd", f"distillation method: {', '.join(METHODS)}")
    data: str = knob(
        "digits",
        f"data set, for methods that learn from images and for the FID: {DATA_SETS}",
    )
    prompts: str | None = knob(
        None,
        f"{PROMPTS}, for a text-conditional teacher in a pipeline's folder: each is as likely in "
        "every batch, and image i of a FID has prompt i; a method that learns from images takes "
        "them for the captions of the images of --data, or of its classes, in their order",
        metavar="FILE",
    )
    seed: int = knob(0, "seed of every random draw", low=0)
    out: Path = knob(
        help="safetensors file to write; for a method of several stages a folder, with a file for "
        "each student"
    )
    keep_branches: bool = knob(
        False, "write each student with all its branches too, as .branches.safetensors beside it"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RecombineOptions(Knobs):
    """``bdense recombine``."""

    branched: str = knob(
        help="a student with its branches, which bdense distill wrote with --keep-branches",
        metavar="BRANCHED",
        form="positional",
    )
    c: tuple[float, ...] | None = knob(
        None,
        "coefficients of the branches, of sum 1, as in --c=0,0,-0.2,1.2; without them those of "
        "the lowest FID are searched",
        metavar="C1,..,CK",
        none=None,
        form="commas",
    )
    evaluations: int = knob(40, "FIDs that a search of c may measure", low=1)
    data: str = knob("digits", f"reference data set of the FID: {DATA_SETS}")
    seed: int = knob(
        0, "seed of the final FID's latents; c is searched on those of the next", low=0
    )
    out: Path = knob(help="safetensors file to write", metavar="FILE")


@dataclass(frozen=True, slots=True, kw_only=True)
class FidOptions(Knobs):
    """``bdense fid``."""

    model: str = knob(help=_MODEL, metavar="MODEL", form="positional")
    data: str | None = knob(
        None,
        f"reference data set: {DATA_SETS}",
        none="the one that the model was trained on, without --reference",
    )
    reference: str | None = knob(
        None,
        "reference statistics (mu, sigma) in place of a data set, for fid only: an .npz file "
        f"like EDM's, or a public one by name: {', '.join(REFERENCES)}",
        metavar="FILE",
    )
    metrics: tuple[MetricName, ...] = knob(
        ("fid",),
        "what to measure: fid always; kid: kernel distance; prc: precision and recall",
    )
    images: int = knob(IMAGES, "images to draw", low=2)
    clip_score: str | None = knob(
        None,
        "also score the images against --prompts by this CLIP model: a folder or hub id, such as "
        "openai/clip-vit-base-patch16",
        metavar="MODEL",
    )
    seed: int = knob(0, "seed of every random draw", low=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyOptions(Cache):
    """``bdense verify``."""

    model: str = knob(
        help="a student's folder, safetensors file or hub id (OWNER/NAME), with a recorded FID",
        metavar="MODEL",
        form="positional",
    )
    json: bool = knob(False, "print the result as JSON", form="flag")
    extractor: str | None = knob(
        None, f"the recorded feature extractor: {_EXTRACTORS}", none="by its recorded name"
    )
    data: str | None = knob(
        None, f"the recorded reference data set: {DATA_SETS}", none="by its recorded name"
    )
    reference: str | None = knob(
        None,
        "the recorded file of reference statistics, in place of a data set",
        metavar="FILE",
        none="by its recorded name",
    )
    pipeline: str | None = knob_of(Drawing, "pipeline", None)
    prompts: str | None = knob(
        None, f"{PROMPTS}: those that the FID was measured under", metavar="FILE"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedHardware(Hardware):
    """Where ``bdense verify`` computes."""

    threads: int | None = knob_of(Hardware, "threads", None, none="as many as recorded")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceOptions(Knobs):
    """``bdense reference``."""

    data: str = knob("digits", f"reference data set: {DATA_SETS}")
    out: Path = knob(help="npz file to write", metavar="FILE")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertOptions(Knobs):
    """``bdense convert``."""

    source: str = knob(
        help="a pickle of EDM or SFD, a folder or hub id (OWNER/NAME) of a UNet2DModel in "
        "diffusers' format, or the name of a public checkpoint, which is downloaded: "
        f"{', '.join(CHECKPOINTS)}",
        metavar="SOURCE",
        form="positional",
    )
    out: Path = knob(
        help="safetensors file to write; .json and .md are written beside it", metavar="FILE"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions(Knobs):
    """``bdense export``."""

    student: str = knob(
        help="a student of one branch: a safetensors file, a folder or hub id (OWNER/NAME); "
        "without --push its teacher must be in diffusers' format",
        metavar="STUDENT",
        form="positional",
    )
    pipeline: str | None = knob(
        None,
        "folder or hub id of the teacher's pipeline, whose autoencoder and text encoder a student "
        "of latents takes over",
        none="a student of pixels needs none",
    )
    lora: bool = knob(
        False,
        "write only adapters of the teacher (LoRA), which `load_lora_weights` of diffusers "
        "loads, of a student of Stable Diffusion trained with --lora-rank",
    )
    out: Path = knob(help="folder to write", metavar="DIR")
    push: str | None = knob(
        None,
        "write a model folder, with the pipeline in it where there is one, and upload it to the "
        "Hugging Face Hub as a new model of this name; needs HF_TOKEN",
        metavar="OWNER/NAME",
        none="upload nothing",
    )


def teacher_configs(arguments: Sequence[str]) -> Configs:
    """The classes of ``bdense teacher``; imports torch."""
    from bdense.training.teacher import TeacherConfig

    later = ReadLater(TeacherConfig)
    return (TeacherOptions, Force, Logging, ModelOptions, later, Execution, Hardware)


def distill_configs(arguments: Sequence[str]) -> Configs:
    """The classes of ``bdense distill`` with the method in the arguments; imports torch.

    Raises:
        InputError: There is no such method.
    """
    method = METHODS[chosen_method(arguments)].Config
    own = (DistillOptions, Force, Logging, WeightOptions, parameter_options())
    return (*own, ReadLater(method), Evaluation, Execution, Hardware)


def chosen_method(arguments: Sequence[str]) -> str:
    """The name after --method, else the default."""
    parser = argparse.ArgumentParser(prog="bdense distill", add_help=False, allow_abbrev=False)
    parser.add_argument("--method", default=knobs_of(DistillOptions)["method"].default)
    return str(parser.parse_known_args(arguments)[0].method)


def methods_with(arguments: Sequence[str], option: str) -> str:
    """The message for an option of ``bdense distill`` that other methods have; "" if none has."""
    having = [name for name in METHODS if option in option_names(METHODS[name].Config)]
    if not having:
        return ""
    method, others = chosen_method(arguments), " or ".join(having)
    return f"--method {method} has no option {option}; --method {others} has it"
