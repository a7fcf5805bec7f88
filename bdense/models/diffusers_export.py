"""Export a student of progressive distillation as a folder that diffusers' ``DDIMPipeline`` loads.

The pipeline's trailing timesteps T i / N - 1 are the levels u = i / N of our grid of N steps, and
it starts from unit noise z too. Its levels are float32, so images differ by rounding: by one of
the 256 values in at most 4 pixels of 10 000 (tiny networks, T of 50 and 1000, N of 1 to 50).
Needs the ``diffusers`` extra.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.diffusion.preconditioning import DDPM, native_schedule
from bdense.diffusion.sampling import Sampler
from bdense.diffusion.solvers import DDIM
from bdense.errors import InputError
from bdense.files import atomic_folder, require_new
from bdense.models.card import pipeline_card, readable_json
from bdense.models.folder import CARD, own_sampler, require_one_branch
from bdense.networks import DiffusersUNet

# Beside diffusers' own files, for metadata that they have no place for.
METADATA = "bdense.json"
_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
_CLIPPED = "use_clipped_model_output"
_INSTEAD = "export it with export_folder, which bdense reads"


def export_pipeline(
    folder: Path, denoiser: NetworkDenoiser, metadata: Mapping[str, Any]
) -> tuple[Path, ...]:
    """Write a student as a ``DDIMPipeline``; the folder appears whole or not at all.

    Called as in its card, the pipeline draws the images of the student's own sampler, N steps of
    DDIM. If that sampler clips predictions, the call has ``use_clipped_model_output=True``:
    otherwise diffusers does not compute the noise from the clipped prediction.

    Args:
        folder: Folder to write; its parent is created.
        denoiser: An unconditional student whose network is a ``DiffusersUNet`` with the
            preconditioning ``DDPM``.
        metadata: JSON values; its ``sampler`` is DDIM on the network's own process, with N steps
            that divide T. Written to ``bdense.json``, with the call as ``pipeline_call``.

    Returns:
        The files.

    Raises:
        InputError: The folder exists, or no ``DDIMPipeline`` draws the student's images;
            checked before any work.
    """
    folder = Path(folder)
    require_new(folder)
    precond = _require_network(denoiser)
    call = _call(own_sampler(metadata), precond)
    known = {**metadata, "pipeline_call": call}
    with atomic_folder(folder) as scratch:
        _pipeline(denoiser, precond, clip=_CLIPPED in call).save_pretrained(scratch)
        written = [path for path in sorted(scratch.rglob("*")) if path.is_file()]
        files = [str(path.relative_to(scratch)) for path in written]
        (scratch / METADATA).write_text(readable_json(_WEIGHTS, denoiser, known))
        (scratch / CARD).write_text(pipeline_card(folder.name, denoiser, metadata, call))
    return tuple(folder / name for name in (*files, METADATA, CARD))


def _pipeline(denoiser: NetworkDenoiser, precond: DDPM, *, clip: bool) -> Any:  # noqa: ANN401
    """A ``DDIMPipeline`` of the student's own network."""
    from diffusers import DDIMPipeline, DDIMScheduler

    # DDPM's options have the scheduler's names.
    scheduler = DDIMScheduler(
        **precond.options(),
        clip_sample=clip,
        clip_sample_range=1.0,
        timestep_spacing="trailing",
        # The last step goes to the clean image, not to the first level.
        set_alpha_to_one=True,
        steps_offset=0,
    )
    return DDIMPipeline(unet=denoiser.model.unet, scheduler=scheduler)


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
