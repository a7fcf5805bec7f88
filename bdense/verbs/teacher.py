"""``bdense teacher``: train a small teacher."""

from collections.abc import Callable
from typing import Any

from bdense.command import Force, kept_in
from bdense.data.datasets import Dataset, load_dataset
from bdense.errors import InputError
from bdense.execution import Execution
from bdense.files import UNFINISHED, plain_json
from bdense.knobs import KnobError
from bdense.models.card import write_card
from bdense.models.store import (
    denoiser_sha256,
    load_denoiser,
    other_run,
    save_denoiser,
)
from bdense.training.teacher import TeacherConfig, teacher_data, train_teacher
from bdense.training.tracking import Tracking
from bdense.verbs.common import (
    Interrupt,
    Progress,
    chosen_hardware,
    require_model_out,
)
from bdense.verbs.options import Hardware, Logging, ModelOptions, TeacherOptions


def teacher(
    own: TeacherOptions,
    replacing: Force,
    logging: Logging,
    model: ModelOptions,
    read_config: Callable[..., TeacherConfig],
    execution: Execution,
    hardware: Hardware,
) -> None:
    """Run the verb."""
    device = chosen_hardware(execution, hardware)
    precond = process(model)
    dataset = load_dataset(own.data)
    config = read_config(
        network=_network(model, dataset, conditional=own.conditional), precond=precond
    )
    identity = plain_json(
        {"precision": execution.precision, **config.as_dict(), **teacher_data(config, dataset)}
    )
    require_model_out(
        own.out, force=replacing.force, problem=lambda path: other_run(path, identity)
    )
    if own.out.exists() and not other_run(own.out, identity):
        print(f"{own.out} sha256 {denoiser_sha256(load_denoiser(own.out)[0])[:16]}, made before")
        return
    scratch = own.out.with_suffix(UNFINISHED)
    with Interrupt() as interrupt, Tracking(logging.log, own.out.stem, identity) as tracking:
        show = Progress(interrupt, kept_in(scratch))

        def on_iteration(done: int, total: int, loss: float) -> None:
            tracking.update("", done, total, {"loss": loss})
            show(done, total, f"loss {loss:.3f}")

        trained = train_teacher(
            dataset,
            config,
            device=device,
            execution=execution,
            checkpoint=scratch,
            on_iteration=on_iteration,
        )
    metadata = {
        "kind": "teacher",
        "data": dataset.name,
        "training": config.as_dict() | {"precision": execution.precision},
        "identity": identity,
    }
    save_denoiser(own.out, trained, metadata)
    write_card(own.out, trained, metadata)
    scratch.unlink(missing_ok=True)
    print(f"{own.out} sha256 {denoiser_sha256(trained)[:16]}")


def process(model: ModelOptions) -> dict[str, Any] | None:
    """Name and options of the preconditioning that was asked for; None is EDM's.

    Raises:
        KnobError: An option is for another one.
    """
    for name, those in {"prediction": ("cosine", "ddpm"), "timesteps": ("ddpm",)}.items():
        value = getattr(model, name)
        if value is not None and model.precond not in those:
            raise KnobError(
                name,
                f"{value} does nothing with `precond` {model.precond}; drop it, or add `precond` "
                f"{' or '.join(those)}",
            )
    if model.precond == "edm":
        return None
    prediction = {} if model.prediction is None else {"prediction_type": model.prediction}
    betas = scaled_betas(model.timesteps or 1000) if model.precond == "ddpm" else {}
    return {"name": model.precond, **prediction, **betas}


def scaled_betas(timesteps: int) -> dict[str, Any]:
    """DDPM's process, whose T = 1000 betas are 1e-4..0.02, in T steps."""
    return {
        "num_train_timesteps": timesteps,
        "beta_start": 0.1 / timesteps,
        "beta_end": 20 / timesteps,
    }


def _network(model: ModelOptions, dataset: Dataset, *, conditional: bool) -> dict[str, Any]:
    """Options of the network that fit the data set."""
    side = dataset.images.shape[-1]
    sides = [side >> level for level in range(len(model.mult))]
    if unknown := sorted(set(model.attention) - set(sides)):
        raise KnobError(
            "attention",
            f"{' '.join(map(str, unknown))}: with {len(sides)} numbers in `mult` the levels of "
            f"{dataset.name} have sides of {', '.join(map(str, sides))}; choose of these",
        )
    network: dict[str, Any] = {
        "model_channels": model.channels,
        "channel_mult": model.mult,
        "num_blocks": model.blocks,
        "attn_resolutions": model.attention,
        "dropout": model.dropout,
    }
    if conditional:
        if not dataset.num_classes:
            raise InputError(
                f"--conditional: data set {dataset.name} has no labels; choose one that has, or "
                "drop --conditional"
            )
        network["label_dim"] = dataset.num_classes
    return network
