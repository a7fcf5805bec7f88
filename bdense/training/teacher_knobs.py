"""How a small teacher is trained; does not import torch."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

from bdense.diffusion import LevelWeight
from bdense.knobs import Knobs, knob

# Of ``bdense.training.latent_digits``.
TeacherRecipe: TypeAlias = Literal["latent-digits"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherKnobs(Knobs):
    """The knobs of a teacher's network and its training."""

    heading: ClassVar[str] = "training"

    network: dict[str, Any] = knob(
        {},
        "options of the SongUNet beyond image size and channels; with label_dim above 0 it is "
        "trained with the classes of the data set",
    )
    kimg: float = knob(help="training length in thousands of images", low=0.001, high=10**9)
    batch: int = knob(256, "images in each iteration", low=1)
    lr: float = knob(2e-3, "Adam's step size after the warm-up", above=0)
    warmup_kimg: float = knob(
        10.0, "thousands of images over which the step size rises linearly from 0", low=0
    )
    ema_halflife_kimg: float = knob(
        10.0,
        "thousands of images after which a weight's share in the average has halved",
        low=0.001,
    )
    seed: int = knob(0, "seed of initial weights, batches, noise and dropout", low=0, below=2**31)
    precond: dict[str, Any] | None = knob(
        None,
        "name (cosine or ddpm) and options of a variance-preserving process to train on, at its "
        "own levels",
        none="EDM's preconditioning",
    )
    loss: LevelWeight | None = knob(
        None,
        "weight of each noise level of that process: 1 (constant), SNR (snr), max(SNR, 1) "
        "(snr_trunc) or SNR + 1 (v)",
        none="snr for epsilon, snr_trunc for sample, v for v_prediction",
    )
    flip: bool = knob(False, "mirror each image with probability 1/2")
    clip: float | None = knob(
        None, "largest norm of the gradient, which is scaled down to it", above=0, none="no limit"
    )
