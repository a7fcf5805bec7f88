"""The training loop: step sizes, evaluations, and checkpoints as commit 3f7be1a wrote them.

What it promises of any stage is in ``tests/contracts/methods.py``.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from bdense import NUMERICS
from bdense.data.datasets import load_dataset
from bdense.errors import CheckpointError, InputError
from bdense.methods.method import Inputs
from bdense.methods.progressive import PDConfig, Progressive, reparameterised
from bdense.methods.sfd import SFD, SFDConfig
from bdense.models.store import denoiser_sha256, load_tensors, save_tensors
from bdense.training.loop import Evaluations, train
from bdense.training.optimisation import OptimisationConfig
from bdense.training.stage import Training
from bdense.training.teacher import TeacherConfig, TeacherStage, new_denoiser
from bdense.weights.weighting import FixedWeights
from tests.contracts.methods import KilledError, dying_in
from tests.pd_nets import small_conv
from tests.small import noise_images, same_weights

TWO = torch.tensor([0.25, 0.75], dtype=torch.float64)


# ---- step sizes ----


@pytest.mark.parametrize(
    ("knobs", "expected"),
    [
        ({"lr_schedule": "constant"}, [1.0] * 5),
        ({"lr_schedule": "linear"}, [1.0, 0.8, 0.6, 0.4, 0.2]),
        ({"lr_schedule": "step"}, [1.0, 1.0, 1.0, 1.0, 0.1]),
        ({"lr_schedule": "constant", "warmup_images": 16}, [0.25, 0.5, 0.75, 1.0, 1.0]),
        ({"lr_schedule": "linear", "warmup_images": 8}, [0.5, 0.8, 0.6, 0.4, 0.2]),
    ],
)
def test_step_sizes_of_five_iterations_of_four_images(knobs, expected):
    run = OptimisationConfig(lr=1.0, **knobs)
    assert [run.lr_at(i, 5, 4) for i in range(5)] == pytest.approx(expected)


# ---- evaluations ----


@pytest.mark.parametrize("after", [0, 5, -1])
def test_evaluations_outside_the_run_are_refused(after):
    evaluations = Evaluations([2, after])
    with pytest.raises(InputError, match=rf"after \[{after}\] iterations lie outside 1\.\.4"):
        train(sfd_stage(), FixedWeights(TWO), evaluations=evaluations)


# ---- checkpoints of commit 3f7be1a ----


def sfd_stage() -> Training:
    method, config = SFD(), SFDConfig(kimg=0.02, batch=4, substeps=2, lr=1e-3)
    return method.stage(method.plan(config)[0], small_conv(), config, Inputs(seed=7))


def pd_stage(prediction_type: str | None = None) -> Training:
    method, teacher = Progressive(), small_conv("cosine")
    config = PDConfig(
        steps=8, until=4, updates=5, batch=4, lr=1e-3, prediction_type=prediction_type
    )
    plan = method.plan(config, teacher)[0]
    return method.stage(plan, teacher, config, Inputs(dataset=noise_images(), seed=7))


def teacher_stage() -> Training:
    network = {"model_channels": 8, "channel_mult": (1, 2), "num_blocks": 1}
    config = TeacherConfig(kimg=0.08, batch=16, seed=3, network=network, clip=1.0)
    digits = load_dataset("digits")
    return TeacherStage(
        config=config, dataset=digits, start=new_denoiser(config, digits.images.shape[1:])
    )


# Written out, as that version's files have them.
SFD_IDENTITY = {
    "weights": {"fixed": [0.25, 0.75]},
    "config.num_branches": 2,
    "config.images": 20,
    "config.lr": 1e-3,
    "config.betas": [0.9, 0.999],
    "config.dropout": True,
    "config.seed": 7,
    "start": denoiser_sha256(small_conv()),
    "trajectories.numerics": NUMERICS,
    "trajectories.teacher": denoiser_sha256(small_conv()),
    "trajectories.teacher_afs": False,
    "trajectories.precision": "float32",
    "trajectories.grid": {
        "levels": [float(t) for t in SFDConfig().levels.grid(6)],
        "substeps": 2,
        "afs": True,
    },
    "trajectories.solver": {
        "name": "DPMSolverPP",
        "max_order": 3,
        "prediction": "data",
        "lower_order_final": True,
        "thresholding": False,
    },
    "trajectories.batch": 4,
    "trajectories.seed": 7,
}
PD_IDENTITY = {
    "numerics": NUMERICS,
    "teacher": denoiser_sha256(small_conv("cosine")),
    "precision": "float32",
    "schedule": {"kind": "cosine", "logsnr_min": -20.0, "logsnr_max": 20.0},
    "weights": [0.25, 0.75],
    "config.updates": 5,
    "config.substeps": 2,
    "config.num_branches": 2,
    "config.batch": 4,
    "config.lr": 1e-3,
    "config.anneal": True,
    "config.optimizer": "adam",
    "config.betas": [0.9, 0.999],
    "config.weight_decay": 0.0,
    "config.clip_norm": 1.0,
    "config.loss": "snr_trunc",
    "config.clip_targets": False,
    "config.weights_space": "clean",
    "config.dropout": False,
    "config.flip": False,
    "config.seed": 7,
    "batches.data": "its-sha256",
    "batches.batch": 4,
    "batches.seed": 7,
    "batches.flip": False,
    "num_steps": 4,
}
CONVERTED_IDENTITY = PD_IDENTITY | {
    "weights": [1.0],
    "config.substeps": 1,
    "config.num_branches": 1,
    "num_steps": 8,
    "start": denoiser_sha256(reparameterised(small_conv("cosine"), "sample")),
}
TEACHER_IDENTITY = {
    "config": {
        "images": 80,
        "batch": 16,
        "lr": 2e-3,
        "warmup_images": 10_000,
        "ema_halflife_images": 10_000,
        "p_mean": -1.2,
        "p_std": 1.2,
        "seed": 3,
        "network": {"model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1},
        "clip": 1.0,
    },
    "data": load_dataset("digits").sha256,
}


@pytest.mark.parametrize(
    ("make", "weights", "kind", "identity"),
    [
        (sfd_stage, TWO, "sfd-training", SFD_IDENTITY),
        (pd_stage, TWO, "pd-training", PD_IDENTITY),
        # Weights were rescaled by whoever called.
        (pd_stage, 4 * TWO, "pd-training", PD_IDENTITY),
        (lambda: pd_stage("sample"), torch.ones(1), "pd-training", CONVERTED_IDENTITY),
        (teacher_stage, torch.ones(1), "teacher-training", TEACHER_IDENTITY),
    ],
    ids=["sfd", "pd", "pd-rescaled", "pd-conversion", "teacher"],
)
def test_a_training_that_an_earlier_version_began_is_resumed(
    tmp_path, make, weights, kind, identity
):
    """Same keys, values and tensors; whatever is not described so is another run."""
    path, old = tmp_path / "new.safetensors", tmp_path / "old.safetensors"
    whole = train(make(), FixedWeights(weights))

    with pytest.raises(KilledError):
        train(
            make(),
            FixedWeights(weights),
            checkpoint=path,
            checkpoint_seconds=0,
            on_iteration=dying_in(2),
        )
    tensors = tensors_of_3f7be1a(path, has_average=kind == "teacher-training")
    save_tensors(old, tensors, {"kind": kind, "iteration": 2, "identity": identity})
    seen: list[int] = []
    resumed = train(
        make(),
        FixedWeights(weights),
        checkpoint=old,
        on_iteration=lambda done: seen.append(done.iteration),
    )
    assert seen == [2, 3, 4]
    assert same_weights(resumed, whole)
    assert load_tensors(old)[1]["identity"] == identity
    save_tensors(old, tensors, {"kind": kind, "iteration": 2, "identity": identity | {"x": 1}})
    with pytest.raises(CheckpointError, match=r"differs in: x\)"):
        train(make(), FixedWeights(weights), checkpoint=old)


def tensors_of_3f7be1a(path: Path, *, has_average: bool) -> dict[str, Tensor]:
    """Those that a version without averages of students knew, all others being refused here."""
    tensors = load_tensors(path)[0]
    known = ("model.", "adam.step.", "adam.exp_avg.", "adam.exp_avg_sq.")
    known += ("ema.model.",) if has_average else ()
    assert all(name.startswith(known) for name in tensors)
    return tensors
