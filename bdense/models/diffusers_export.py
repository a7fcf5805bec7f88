"""Export students as folders that diffusers loads.

A student of progressive distillation on pixels becomes a ``DDIMPipeline``: its trailing timesteps
T i / N - 1 are the levels u = i / N of our grid of N steps, and it starts from unit noise z too.
Its levels are float32, so images differ by rounding: by one of the 256 values in at most 4 pixels
of 10 000 (tiny networks, T of 50 and 1000, N of 1 to 50). A student of latents becomes its
teacher's pipeline, see ``latent_pipeline``. Needs the ``diffusers`` extra.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.diffusion.preconditioning import DDPM, native_schedule
from bdense.diffusion.sampling import Sampler, samplers_from
from bdense.diffusion.solvers import DDIM
from bdense.errors import InputError
from bdense.files import atomic_folder, require_new
from bdense.models.card import pipeline_card, readable_json
from bdense.models.diffusers_files import LORA_WEIGHTS, METADATA, PIPELINE, WEIGHTS
from bdense.models.folder import CARD, measured_sampler, require_one_branch
from bdense.models.latent_pipeline import LatentPipeline, latent_pipeline
from bdense.models.latents import draws_latents, require_own_codec
from bdense.networks.diffusers_network import DiffusersNetwork
from bdense.networks.diffusers_unet import DiffusersUNet

_CLIPPED = "use_clipped_model_output"
_INSTEAD = "export it with export_folder, which bdense reads"


def export_pipeline(
    folder: Path,
    denoiser: NetworkDenoiser,
    metadata: Mapping[str, Any],
    *,
    teacher: str | Path | None = None,
) -> tuple[Path, ...]:
    """Write a student as a pipeline of diffusers; the folder appears whole or not at all.

    Called as in its card, the pipeline draws the images of the student's own sampler, at the
    guidance that its FID was measured at. Of pixels it
    is a ``DDIMPipeline``, N steps of DDIM; if the sampler clips predictions, the call has
    ``use_clipped_model_output=True``: otherwise diffusers does not compute the noise from the
    clipped prediction. Of latents it is a ``StableDiffusionPipeline``, ``DiTPipeline`` or
    ``LDMPipeline`` with a scheduler of its own, ``StudentScheduler``, which diffusers loads with
    ``trust_remote_code=True``; it has no safety checker.

    Args:
        denoiser: A student of one branch, with the preconditioning ``DDPM``; of pixels an
            unconditional ``DiffusersUNet``.
        metadata: JSON values with its ``sampler``; of pixels that is DDIM on the network's own
            process, with N steps that divide T, and of latents any whose steps are linear. Written
            to ``bdense.json``, with the call as ``pipeline_call``; ``load_model`` reads them back.
        teacher: Of latents, the folder or hub id of the teacher's pipeline, whose autoencoder and
            text encoder are taken over.

    Returns:
        The files.

    Raises:
        InputError: The folder exists, no pipeline of diffusers draws the student's images, or the
            teacher's pipeline lacks a part; checked before anything is written.
    """
    folder = Path(folder)
    require_new(folder)
    pipeline = _pipeline_of(denoiser, metadata, teacher)
    return write_pipeline(folder, denoiser, metadata, pipeline, pipeline.write)


def add_pipeline(
    folder: Path,
    denoiser: NetworkDenoiser,
    metadata: Mapping[str, Any],
    *,
    teacher: str | Path | None,
) -> None:
    """Add the diffusers pipeline to a model folder, where there is one; else stderr says why not.

    Args:
        folder: The model folder.
        denoiser: The student; of a network that is not diffusers' own nothing is added.
        metadata: See ``export_pipeline``.
        teacher: See ``export_pipeline``.
    """
    if not isinstance(denoiser.model, DiffusersNetwork):
        return
    try:
        export_pipeline(folder / PIPELINE, denoiser, metadata, teacher=teacher)
    except InputError as error:
        sys.stderr.write(f"no diffusers pipeline is written: {error}\n")


@dataclass(frozen=True, eq=False, kw_only=True)
class _DDIMPipeline:
    """A student of pixels as a ``DDIMPipeline``, with the members of ``LatentPipeline``."""

    denoiser: NetworkDenoiser
    call: Mapping[str, Any]

    name: ClassVar[str] = "DDIMPipeline"
    facts: ClassVar[Mapping[str, Any]] = {}

    @property
    def example(self) -> dict[str, Any]:
        """Arguments of a call that draws images."""
        return {"batch_size": 64, **self.call}

    def write(self, folder: Path) -> None:
        """Write everything but the card into an empty folder."""
        from diffusers import DDIMPipeline, DDIMScheduler

        # DDPM's options have the scheduler's names.
        scheduler = DDIMScheduler(
            **self.denoiser.precond.options(),
            clip_sample=_CLIPPED in self.call,
            clip_sample_range=1.0,
            timestep_spacing="trailing",
            # The last step goes to the clean image, not to the first level.
            set_alpha_to_one=True,
            steps_offset=0,
        )
        network = self.denoiser.model.unet
        DDIMPipeline(unet=network, scheduler=scheduler).save_pretrained(folder)


def write_pipeline(
    folder: Path,
    denoiser: NetworkDenoiser,
    metadata: Mapping[str, Any],
    pipeline: LatentPipeline | _DDIMPipeline,
    write: Callable[[Path], object],
    *,
    lora: bool = False,
) -> tuple[Path, ...]:
    """Write a student as a folder that diffusers loads; it appears whole or not at all.

    Args:
        write: Writes everything but metadata and card into an empty folder.
        lora: Whether that is adapters of the teacher.

    Returns:
        The files.
    """
    metadata = {**metadata, **pipeline.facts}
    name, call, example = pipeline.name, pipeline.call, pipeline.example
    card = pipeline_card(folder.name, denoiser, metadata, call, name, example, lora=lora)
    weights = LORA_WEIGHTS if lora else f"{denoiser.model.part}/{WEIGHTS}.safetensors"
    known = {**metadata, "pipeline_call": dict(call)}
    with atomic_folder(folder) as scratch:
        write(scratch)
        (scratch / METADATA).write_text(readable_json(weights, denoiser, known))
        (scratch / CARD).write_text(card)
        written = [path for path in sorted(scratch.rglob("*")) if path.is_file()]
        files = [path.relative_to(scratch) for path in written]
    return tuple(folder / file for file in files)


def _pipeline_of(
    denoiser: NetworkDenoiser, metadata: Mapping[str, Any], teacher: str | Path | None
) -> LatentPipeline | _DDIMPipeline:
    """The student's pipeline, once nothing speaks against it."""
    if denoiser.step_condition:
        raise InputError(
            "the student is told its number of steps by layers that diffusers does not have; "
            f"distil one for a single NFE, or {_INSTEAD}"
        )
    if draws_latents(denoiser, metadata):
        sampler = measured_sampler(metadata)
        require_one_branch(denoiser)
        if teacher is None:
            raise InputError(
                "the student draws latents, and its pipeline takes over the teacher's autoencoder "
                "and text encoder; give the folder of the teacher's pipeline (teacher)"
            )
        if len(samplers_from(metadata)) > 1:
            raise InputError(
                f"the student serves several NFE, {metadata['nfe']}, and a pipeline of latents "
                f"one; {_INSTEAD}"
            )
        latent = latent_pipeline(denoiser, sampler, teacher)
        require_own_codec(denoiser, metadata, teacher)
        return latent
    precond = _require_network(denoiser)
    return _DDIMPipeline(denoiser=denoiser, call=_call(measured_sampler(metadata), precond))


def _require_network(denoiser: NetworkDenoiser) -> DDPM:
    """The preconditioning of a network that the pipeline can hold."""
    network, precond = denoiser.model, denoiser.precond
    if not isinstance(network, DiffusersUNet):
        raise InputError(
            f"a DDIMPipeline needs a UNet2DModel of diffusers, but the student is a "
            f"{denoiser.describe()['network']}; distil a diffusers teacher, or {_INSTEAD}"
        )
    require_one_branch(denoiser)
    if precond.outputs > 1:
        raise InputError(
            f"the student predicts a variance too, which a DDIMPipeline does not take; {_INSTEAD}"
        )
    if network.label_dim:
        raise InputError(
            f"the student has {network.label_dim} classes, but a DDIMPipeline takes no class; "
            f"{_INSTEAD}"
        )
    if not isinstance(precond, DDPM):
        raise InputError(
            f"a DDIMPipeline calls its network at the times of a DDPM, but the student has "
            f"precond={precond.name!r}; {_INSTEAD}"
        )
    return precond


def _call(sampler: Sampler, precond: DDPM) -> dict[str, Any]:
    """Arguments of the pipeline for the student's sampler."""
    if not isinstance(sampler.solver, DDIM) or sampler.afs:
        rule = f"{type(sampler.solver).__name__}{' with afs' * sampler.afs}"
        raise InputError(
            f"a DDIMPipeline draws with DDIM, but the student was distilled for {rule} steps; "
            f"{_INSTEAD}"
        )
    if sampler.schedule.describe() != native_schedule(precond).describe():
        raise InputError(
            "a DDIMPipeline follows the schedule that its network was trained on, but the student "
            f"was distilled on another ({sampler.schedule.text()}); distil it on its teacher's, "
            f"or {_INSTEAD}"
        )
    steps, times = sampler.num_intervals, precond.num_train_timesteps
    if times % steps:
        nearest = max(divisor for divisor in range(1, steps) if times % divisor == 0)
        raise InputError(
            f"{steps} steps do not divide the network's {times} training times: a DDIMPipeline "
            f"would round them and draw other images; distil to {nearest} steps, or {_INSTEAD}"
        )
    call: dict[str, Any] = {"num_inference_steps": steps, "eta": 0.0}
    if sampler.solver.clip:
        call[_CLIPPED] = True
    return call
