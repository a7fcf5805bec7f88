"""A student of progressive distillation as a folder that diffusers' ``DDIMPipeline`` loads alone.

Its trailing timesteps T i / N - 1 are the levels of our grid of N steps, at u = i / N, and its
unit noise z is ours. Images differ by rounding alone, as its levels are float32: by one of the
256 values in at most 4 pixels of 10 000 (tiny networks, T of 50 and 1000, N of 1 to 50). Needs
the ``diffusers`` extra, which a student of a diffusers teacher needs as well.
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
from bdense.models.cards import pipeline_card
from bdense.models.convert import readable_json
from bdense.models.folders import CARD, own_sampler, require_one_branch
from bdense.models.store import denoiser_sha256
from bdense.networks import DiffusersUNet

# Beside diffusers' own files, for what they have no place for.
METADATA = "bdense.json"
_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
_CLIPPED = "use_clipped_model_output"
_INSTEAD = "export_folder writes it as a folder that this project reads"


def export_pipeline(
    folder: Path, denoiser: NetworkDenoiser, metadata: Mapping[str, Any]
) -> tuple[Path, ...]:
    """Write a student as a ``DDIMPipeline``, which appears whole by one rename or not at all.

    Called as its card says, the pipeline draws the images of the student's own sampler: N steps
    of DDIM; where that clips predictions, ``use_clipped_model_output=True`` belongs to the call,
    as in diffusers the noise does not follow from the clipped prediction otherwise.

    Args:
        folder: Where it will lie; its parent is made.
        denoiser: An unconditional student whose network is a ``DiffusersUNet`` with the
            preconditioning ``DDPM``.
        metadata: JSON-able; its ``sampler`` is DDIM on the network's own process, with N steps
            that divide T. All is written to ``bdense.json``, with the call as ``pipeline_call``.

    Returns:
        The files.

    Raises:
        InputError: The folder exists, or no ``DDIMPipeline`` draws what the student does; it says
            why, before any work.
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
        weights = denoiser_sha256(denoiser)
        (scratch / METADATA).write_text(readable_json(_WEIGHTS, denoiser, known, weights))
        (scratch / CARD).write_text(pipeline_card(folder.name, denoiser, metadata, call))
    return tuple(folder / name for name in (*files, METADATA, CARD))


def _pipeline(denoiser: NetworkDenoiser, precond: DDPM, *, clip: bool) -> Any:  # noqa: ANN401
    """A ``DDIMPipeline`` of the student's own network."""
    from diffusers import DDIMPipeline, DDIMScheduler

    # The names of its options are the scheduler's own.
    scheduler = DDIMScheduler(
        **precond.options(),
        clip_sample=clip,
        clip_sample_range=1.0,
        timestep_spacing="trailing",
        # The last step is to the clean image, not to the first level.
        set_alpha_to_one=True,
        steps_offset=0,
    )
    return DDIMPipeline(unet=denoiser.model.unet, scheduler=scheduler)


def _require_network(denoiser: NetworkDenoiser) -> DDPM:
    """The preconditioning of a network that the pipeline can hold."""
    network, precond = denoiser.model, denoiser.precond
    if not isinstance(network, DiffusersUNet):
        raise InputError(
            f"a DDIMPipeline holds a UNet2DModel of diffusers, and the student is a "
            f"{denoiser.describe()['network']}; distil a diffusers teacher, or {_INSTEAD}"
        )
    require_one_branch(denoiser)
    if network.label_dim:
        raise InputError(
            f"the student has {network.label_dim} classes, and a DDIMPipeline asks for none; "
            f"{_INSTEAD}"
        )
    if not isinstance(precond, DDPM):
        raise InputError(
            f"a DDIMPipeline calls its network at the times of a DDPM, and the student has "
            f"precond={precond.name!r}; {_INSTEAD}"
        )
    return precond


def _call(sampler: Sampler, precond: DDPM) -> dict[str, Any]:
    """What the pipeline must be called with to draw as the student's sampler does."""
    if not isinstance(sampler.solver, DDIM) or sampler.afs:
        rule = f"{type(sampler.solver).__name__}{' with afs' * sampler.afs}"
        raise InputError(
            f"a DDIMPipeline draws by DDIM, and the student was distilled for steps of {rule}; "
            f"{_INSTEAD}"
        )
    if sampler.schedule.describe() != native_schedule(precond).describe():
        raise InputError(
            "a DDIMPipeline walks the process that its network was trained on, and the student "
            f"was distilled on another ({sampler.schedule.text()}); distil it on its teacher's "
            f"own, or {_INSTEAD}"
        )
    steps, times = sampler.num_intervals, precond.num_train_timesteps
    if times % steps:
        nearest = max(divisor for divisor in range(1, steps) if times % divisor == 0)
        raise InputError(
            f"{steps} steps do not divide the {times} times that the network was trained at: a "
            "DDIMPipeline would round them to whole times and draw other images; distil to "
            f"{nearest} steps, or {_INSTEAD}"
        )
    call: dict[str, Any] = {"num_inference_steps": steps, "eta": 0.0}
    if sampler.solver.clip:
        call[_CLIPPED] = True
    return call
