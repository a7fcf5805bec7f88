"""How a network F becomes a denoiser D (Karras et al. 2022, table 1); each column is a class.

D(x; sigma) = c_skip x + c_out F(c_in x, c_noise). Each class gives the four coefficients for sigma
[B, 1, 1, 1], in its dtype and on its device. ``c_in`` and ``c_noise`` translate into the
coordinates that the network was trained in.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from bdense.diffusion.ddpm import DDPMSchedule, DiscreteSchedule
from bdense.diffusion.vp import CosineSchedule, Levels, VPSchedule
from bdense.errors import CheckpointError, InputError
from bdense.knobs import Knobs, knob

P = TypeVar("P", CosineSchedule, DDPMSchedule)
_MOST_LEVELS = 100_000  # a file's number, which is taken as memory and time


class Coefficients(NamedTuple):
    """c_skip, c_out, c_in and c_noise, each [B, 1, 1, 1]."""

    skip: Tensor
    out: Tensor
    into: Tensor
    noise: Tensor


@dataclass(frozen=True, kw_only=True)
class _Column(Knobs):
    """A column of the table; whole numbers stay whole, as they are part of a denoiser's digest.

    Attributes:
        name: Its name in the description of a denoiser.
        outputs: Network outputs a pixel and channel, of which the first is F.
        process: The variance-preserving process that the network was trained on, if it was one.
    """

    name: ClassVar[str]
    outputs: ClassVar[int] = 1
    process: ClassVar[None] = None

    def options(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class EDM(_Column):
    """Karras et al.'s own: network inputs and targets of unit variance at every level."""

    name = "edm"
    sigma_min: ClassVar[float] = 0.0
    sigma_max: ClassVar[float] = math.inf

    sigma_data: int | float = knob(0.5, above=0)

    def __call__(self, sigma: Tensor) -> Coefficients:
        variance = self.sigma_data**2 + sigma**2
        return Coefficients(
            skip=self.sigma_data**2 / variance,
            out=sigma * self.sigma_data / variance.sqrt(),
            into=1 / variance.sqrt(),
            noise=sigma.log() / 4,
        )


@dataclass(frozen=True, kw_only=True)
class VP(_Column):
    """Variance preserving (Song et al. 2021): F predicts the noise.

    sigma(t)^2 = exp(beta_d t^2 / 2 + beta_min t) - 1 for t from ``epsilon_t`` to 1; the network
    sees t as (M - 1) t.
    """

    name = "vp"

    beta_d: int | float = knob(19.9, above=0)
    beta_min: int | float = knob(0.1)
    M: int = knob(1000, above=0)
    epsilon_t: int | float = knob(1e-5, above=0)

    def __call__(self, sigma: Tensor) -> Coefficients:
        # log1p: at small levels log(1 + sigma^2) has lost sigma, in float32 below 3e-4 all of it.
        root = (self.beta_min**2 + 2 * self.beta_d * torch.log1p(sigma**2)).sqrt()
        time = (root - self.beta_min) / self.beta_d
        return Coefficients(
            skip=torch.ones_like(sigma),
            out=-sigma,
            into=1 / (sigma**2 + 1).sqrt(),
            noise=(self.M - 1) * time,
        )

    @property
    def sigma_min(self) -> float:
        return self._sigma(self.epsilon_t)

    @property
    def sigma_max(self) -> float:
        return self._sigma(1.0)

    def _sigma(self, time: float) -> float:
        return math.sqrt(math.expm1(self.beta_d * time**2 / 2 + self.beta_min * time))


@dataclass(frozen=True, kw_only=True)
class VE(_Column):
    """Variance exploding (Song et al. 2021): F predicts minus the noise."""

    name = "ve"

    sigma_min: int | float = knob(0.02, above=0)
    sigma_max: int | float = knob(100.0, above=0)

    def __call__(self, sigma: Tensor) -> Coefficients:
        return Coefficients(
            skip=torch.ones_like(sigma),
            out=sigma,
            into=torch.ones_like(sigma),
            noise=(sigma / 2).log(),
        )


@dataclass(frozen=True, kw_only=True)
class IDDPM(_Column):
    """Improved DDPM (Nichol & Dhariwal 2021): M levels u_0 > ... > u_M = 0, F predicts the noise.

    c_noise is M - 1 - argmin_j |u_j - sigma|; x itself keeps its own sigma. The network predicts a
    variance as well, in a second C channels, which no sampler here uses.
    """

    name = "iddpm"
    outputs = 2

    C_1: int | float = knob(0.001, above=0)
    C_2: int | float = knob(0.008, above=0)
    M: int = knob(1000, low=1, high=_MOST_LEVELS)

    def __call__(self, sigma: Tensor) -> Coefficients:
        levels = _iddpm_table(self, sigma.dtype, sigma.device)
        nearest = (levels - sigma.reshape(-1, 1)).abs().argmin(dim=1).view_as(sigma)
        return Coefficients(
            skip=torch.ones_like(sigma),
            out=-sigma,
            into=1 / (sigma**2 + 1).sqrt(),
            noise=(self.M - 1 - nearest).to(sigma),
        )

    def levels(self) -> list[float]:
        """u_0 > ... > u_M = 0."""
        return _iddpm_levels(self.C_1, self.C_2, self.M)

    @property
    def sigma_min(self) -> float:
        return self.levels()[-2]

    @property
    def sigma_max(self) -> float:
        return self.levels()[0]


@functools.lru_cache(maxsize=8)
def _iddpm_table(precond: IDDPM, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``levels`` as a tensor, kept: no call copies it to a GPU."""
    return torch.tensor(precond.levels(), dtype=dtype, device=device)


@functools.lru_cache(maxsize=8)
def _iddpm_levels(C_1: float, C_2: float, M: int) -> list[float]:
    """u_{j-1} = sqrt((u_j^2 + 1) / max(alpha_{j-1} / alpha_j, C_1) - 1) from u_M = 0 up."""

    def alpha(j: int) -> float:
        return math.sin(math.pi / 2 * j / (M * (C_2 + 1))) ** 2

    levels = [0.0]
    for j in range(M, 0, -1):
        ratio = max(alpha(j - 1) / alpha(j), C_1)
        levels.append(math.sqrt((levels[-1] ** 2 + 1) / ratio - 1))
    return levels[::-1]


# What F predicts (diffusers' names): the noise eps, the image x_0, or v = alpha eps - s x_0
# (Salimans & Ho 2022).
PREDICTIONS = ("epsilon", "sample", "v_prediction")


def _require_prediction(prediction_type: str) -> None:
    if prediction_type not in PREDICTIONS:
        raise InputError(
            f"prediction_type must be one of {', '.join(PREDICTIONS)}, got {prediction_type!r}"
        )


def _vp_coefficients(prediction_type: str, sigma: Tensor, noise: Tensor) -> Coefficients:
    """Of a network that sees z = x / sqrt(1 + sigma^2); D = x_0 for each prediction."""
    variance = 1 + sigma**2
    skip, out = {
        "epsilon": (torch.ones_like(sigma), -sigma),
        "sample": (torch.zeros_like(sigma), torch.ones_like(sigma)),
        "v_prediction": (1 / variance, -sigma / variance.sqrt()),
    }[prediction_type]
    return Coefficients(skip=skip, out=out, into=1 / variance.sqrt(), noise=noise)


@dataclass(frozen=True, kw_only=True)
class DDPM(DDPMSchedule):
    """A network trained at T discrete times (Ho et al. 2020), as in diffusers' schedulers.

    The network sees z = x / sqrt(1 + sigma^2) and the time of sigma, a fraction between two of
    the trained ones.

    Attributes:
        prediction_type: What F predicts, one of ``PREDICTIONS``.
        learned_variance: Whether the network predicts a variance as well, in a second C channels,
            which no sampler here uses.
    """

    name: ClassVar[str] = "ddpm"

    prediction_type: str = "epsilon"
    learned_variance: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_prediction(self.prediction_type)

    def __call__(self, sigma: Tensor) -> Coefficients:
        return _vp_coefficients(self.prediction_type, sigma, self.time(sigma).to(sigma))

    @property
    def outputs(self) -> int:
        return 2 if self.learned_variance else 1

    @property
    def process(self) -> DDPMSchedule:
        return _process(DDPMSchedule, self)

    def options(self) -> dict[str, Any]:
        options = super().options()
        if not self.learned_variance:  # the options are part of a denoiser's digest
            del options["learned_variance"]
        return options


@dataclass(frozen=True, kw_only=True)
class Cosine(CosineSchedule):
    """A network trained in the continuous time of the cosine process (Salimans & Ho 2022).

    It sees z = x / sqrt(1 + sigma^2) and 1000 arctan(sigma) / (pi / 2), their ``inv_cos`` input.
    """

    name: ClassVar[str] = "cosine"
    outputs: ClassVar[int] = 1
    # The input's own bounds on logsnr, whatever those of the process.
    largest: ClassVar[float] = math.exp(10)

    prediction_type: str = "v_prediction"

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_prediction(self.prediction_type)

    def __call__(self, sigma: Tensor) -> Coefficients:
        angle = sigma.clamp(1 / self.largest, self.largest).atan()
        return _vp_coefficients(self.prediction_type, sigma, angle * (2000 / math.pi))

    @property
    def process(self) -> CosineSchedule:
        return _process(CosineSchedule, self)


def _process(kind: type[P], precond: P) -> P:
    """The process alone, without what the network predicts."""
    return kind(**{each.name: getattr(precond, each.name) for each in fields(kind)})


# ``sigma_min`` and ``sigma_max`` of each are the levels that a network was trained for, 0 and
# infinity where it has no bounds.
Preconditioning: TypeAlias = EDM | VP | VE | IDDPM | DDPM | Cosine
PRECONDITIONINGS: dict[str, type[Preconditioning]] = {
    column.name: column for column in (EDM, VP, VE, IDDPM, DDPM, Cosine)
}


def native_schedule(precond: Preconditioning) -> VPSchedule:
    """The process that a network was trained on.

    Raises:
        InputError: It was trained at noise levels of its own, without a process.
    """
    if precond.process is None:
        raise InputError(
            "schedule native needs a network of a VP process (ddpm, cosine), and this one has "
            f"precond={precond.name!r}; choose another schedule"
        )
    return precond.process


def levels_on(levels: Levels | None, precond: Preconditioning) -> Levels:
    """Levels as a network has them: None is native, and discrete ones divide its own times.

    Raises:
        InputError: The network has no process, or not one of discrete times.
    """
    if levels is None:
        return native_schedule(precond)
    if isinstance(levels, DiscreteSchedule):
        return levels.of(precond.process)
    return levels


def make_preconditioning(name: str, options: Mapping[str, Any]) -> Preconditioning:
    """The preconditioning of that name in ``PRECONDITIONINGS``, from its ``options()``.

    Raises:
        CheckpointError: It has other options.
    """
    try:
        return PRECONDITIONINGS[name](**options)
    except TypeError as error:
        raise CheckpointError(f"the options do not fit precond={name!r}: {error}") from error
