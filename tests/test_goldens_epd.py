"""EPD against golden files: the solver, and learning its table through the training loop."""

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.diffusion.epd import EPD, Table
from bdense.diffusion.intervals import IntervalGrid
from bdense.diffusion.preconditioning import EDM, levels_on
from bdense.diffusion.sampling import Sampler
from bdense.diffusion.schedules import Schedule
from bdense.diffusion.solvers import DPM2, analytical_first_step, make_solver, trajectory
from bdense.methods.epd import EPDConfig, EPDStage, RawTable
from bdense.methods.trajectories import Trajectories
from bdense.networks import Network
from bdense.training.loop import train
from bdense.weights.weighting import FixedWeights
from tests.goldens import close, discover, settings, tensors
from tests.latent_goldens import LATENT, condition_of, network_of

pytestmark = pytest.mark.golden

DTYPES = [torch.float64, torch.float32]
ONE = torch.ones(1, dtype=torch.float64)


class Mixture:
    """The exact D(x; sigma) of a mixture of Gaussians of one standard deviation, in float64."""

    def __init__(self, means: Tensor, weights: Tensor, std: float) -> None:
        self.means, self.weights, self.std = means, weights, std

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        state, variance = x.double(), self.std**2 + sigma.double().reshape(-1, 1) ** 2
        squares = (state[:, None] - self.means).square().flatten(2).sum(2)
        shares = (self.weights.log() - squares / (2 * variance)).softmax(1)
        mean = torch.einsum("bk,kchw->bchw", shares, self.means)
        pull = (self.std**2 / variance)[..., None, None]
        return (mean + pull * (state - mean)).to(x)


def mixture(info: dict[str, Any], data: dict[str, Tensor]) -> Mixture:
    return Mixture(data["means"], data["weights"], info["mixture_std"])


def cases(pattern: str) -> list[Any]:
    """Each case of each file that matches."""
    found = []
    for param in discover(pattern, LATENT):
        (path,) = param.values
        if path is None:
            return [pytest.param(None, "", marks=param.marks, id=param.id)]
        found += [
            pytest.param(path, name, id=f"{path.stem}-{name}") for name in settings(path)["cases"]
        ]
    return found


@functools.cache
def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return settings(path), tensors(path)


def of_case(path: Path, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The case's settings, and its arrays beside those that all cases share."""
    info, data = read(path)
    prefix = f"{name}."
    own = {k.removeprefix(prefix): v for k, v in data.items() if k.startswith(prefix)}
    return info["cases"][name], own


def close_by_row(actual: Tensor, golden: Tensor, bound: float) -> None:
    for row, expected in zip(actual, golden, strict=True):
        close(row, expected, rtol_of_max=bound)


def sampler_of(case: dict[str, Any], table: dict[str, Tensor]) -> Sampler:
    rows = {name: table[name].tolist() for name in Table._fields}
    solver = EPD(**rows, max_order=case.get("max_order") or 1)
    return Sampler(num_intervals=case["num_intervals"], afs=case["afs"], solver=solver)


def check_walk(case: dict, table: dict, denoise, start: Tensor, golden: Tensor, bound: float):
    sampler = sampler_of(case, table)
    assert (sampler.nfe, sampler.sequential_nfe) == (case["nfe"], case["sequential_nfe"])
    calls: list[int] = []

    def counted(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append(len(x) // len(start))
        return denoise(x, sigma)

    levels = table["levels"]
    model = analytical_first_step(counted, levels[0]) if case["afs"] else counted
    with torch.no_grad():
        close_by_row(trajectory(sampler.solver, model, start, levels), golden, bound)
    assert (sum(calls), len(calls)) == (case["nfe"], case["sequential_nfe"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("path", "name"), cases("epd-*.json"))
def test_the_solver(path, name, dtype):
    info, data = read(path)
    case, own = of_case(path, name)
    bound = 1e-6 if dtype == torch.float64 else 1e-4
    start = own["walk"][0].to(dtype)
    check_walk(case, own, mixture(info, data), start, own["walk"], bound)


@pytest.mark.parametrize("solver", [EPD(), DPM2()], ids=["epd", "dpm2"])
@pytest.mark.parametrize("path", discover("epd-*.json", LATENT))
def test_the_midpoint_is_dpm_solver_2(path, solver):
    info, data = read(path)
    levels, golden = data["midpoint.levels"], data["midpoint.walk"]
    states = trajectory(solver, mixture(info, data), golden[0], levels)
    close_by_row(states, golden, 1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("path", "name"), cases("epdref-*.json"))
def test_the_solver_and_its_plug_in(path, name, dtype):
    """Against the public code; the table is decoded from the raw numbers."""
    info, data = read(path)
    case, own = of_case(path, name)
    raw = {each: own[f"raw.{each}"].to(dtype) for each in Table._fields}
    config = config_of(case)
    levels, decoded = config.levels, RawTable(config, Table(**raw))()
    for each, values in decoded._asdict().items():
        close(values.detach(), own[each], atol=1e-12 if dtype == torch.float64 else 1e-6)
    bound = 1e-9 if dtype == torch.float64 else 1e-4
    if "folder" in case:
        bound = max(bound, 1e-6)
        denoiser = network_of(case, dtype)
        levels = levels_on(levels, denoiser.precond)
        text, null = (condition_of(denoiser, data[f"latent.{name}"]) for name in ("text", "null"))
        noise = data["latent.noise"]
        denoise = denoiser.given(text, guidance=case["guidance"], null=null)
    else:
        noise, denoise = data["noise"], mixture(info, data)
    close(levels.grid(case["num_intervals"]), own["levels"], rtol_of_max=1e-12)
    start = (own["levels"][0] * noise.double()).to(dtype)
    check_walk(case, own, denoise, start, own["walk"], bound)


# ---- learning ----


class MixtureNetwork(Network):
    """F of which EDM's preconditioning makes the mixture's D."""

    def __init__(self, exact: Mixture) -> None:
        super().__init__()
        self.exact = exact
        self.img_channels, self.img_resolution = exact.means.shape[1:3]
        self.num_branches, self.prediction_channels = 1, self.img_channels
        self.head_name = "head"
        self.like = nn.Parameter(torch.zeros(1))

    @classmethod
    def build(cls, options, *, num_branches, outputs):
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        return {"network": "MixtureNetwork", "config": {}}

    def select(self, branch):
        return self

    def forward(self, x, noise_labels, class_labels=None, augment_labels=None, num_points=None):
        sigma = (4 * noise_labels).exp()
        c_skip, c_out, c_in, _ = EDM()(sigma.view(-1, 1, 1, 1))
        state = x / c_in
        return (self.exact(state, sigma) - c_skip * state) / c_out


def config_of(case: dict[str, Any], **knobs: Any) -> EPDConfig:
    kind, _, rho = case["grid"].partition(" rho ")
    return EPDConfig(
        steps=case["num_intervals"],
        points=case["points"],
        afs=case["afs"],
        max_order=case.get("max_order") or 1,
        bound_o=case["bound_o"],
        bound_s=case["bound_s"],
        last_scale=not case.get("last_o_is_one", False),
        schedule=kind,
        **({"rho": float(rho)} if kind == "polynomial" else {}),
        sigma_min=case["sigma_min"],
        sigma_max=case["sigma_max"],
        **knobs,
    )


class TrajectoriesFromFile(Trajectories):
    """Of the file's noise; the teacher may take two steps in each of its sub-steps."""

    def __init__(self, teacher: NetworkDenoiser, case: dict, config: EPDConfig, noise: Tensor):
        grid = IntervalGrid(
            num_intervals=config.steps,
            substeps=case["substeps"],
            afs=False,
            schedule=config.levels,
        )
        name = case["teacher"]
        solver = "ipndm" if "iPNDM" in name else "heun" if "Heun" in name else "dpm2"
        super().__init__(
            teacher=teacher,
            grid=grid,
            solver=make_solver(solver),
            batch=noise.shape[1],
            count=len(noise),
            seed=0,
            conditions=teacher.conditions,
        )
        object.__setattr__(self, "file", (noise, 2 if "TWO sub-steps" in name else 1))

    def noise(self, iteration: int) -> Tensor:
        return self.file[0][iteration]

    def _states(self, grid, start, condition):
        fine, parts = grid.fine(), self.file[1]
        halves = [
            Schedule(sigma_min=float(low), sigma_max=float(high)).grid(parts)
            for high, low in itertools.pairwise(fine)
        ]
        finer = torch.cat([fine[:1], *(each[1:] for each in halves)])
        states = trajectory(self.solver, self.teacher.given(condition), start, finer)
        return states[parts::parts]


def _updates_of(case: dict[str, Any]) -> str:
    text = case["update"]
    if text.startswith("last"):
        return "last"
    return "detached" if "states detached" in text else "each"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("path", "name"), cases("epdtrain-*.json"))
def test_learning_a_table(path, name, dtype):
    """Through the training loop; the teacher, losses, the first gradient, the table at the end."""
    info, data = read(path)
    case, own = of_case(path, name)
    exact = dtype == torch.float64
    batch, iterations = case["batch"], case["iterations"]
    if case["solver"] == "ipndm":
        case = {"max_order": 4} | case
    config = config_of(
        case,
        updates=_updates_of(case),
        lr=case["lr"],
        lr_schedule="constant",
        batch=batch,
        kimg=iterations * batch / 1000,
    )
    teacher = NetworkDenoiser(MixtureNetwork(mixture(info, data)).to(dtype)).eval()
    noise = own.get("noise", data.get("noise"))
    trajectories = TrajectoriesFromFile(teacher, case, config, noise)
    raw = Table(**{each: own[f"raw.{each}.init"].to(dtype) for each in Table._fields})

    def stage() -> EPDStage:
        table = RawTable(config, raw)
        return EPDStage(config=config, trajectories=trajectories, table=table, seed=0)

    first = stage()
    close(trajectories.grid.student(), own["levels"], rtol_of_max=1e-12)
    walked = first.batch(0, slice(None))
    ends = walked.states[case["substeps"] - 1 :: case["substeps"]]
    close_by_row(ends, own["teacher_ends_0"], 1e-9 if exact else 1e-4)

    network = first.start.model.widen(1)
    student = NetworkDenoiser(network, teacher.precond)
    first.begin(student)
    update = next(iter(first.updates(0, walked)))
    update(student.branches).per_branch.sum().backward()
    if config.updates != "last":
        close(update.end.detach(), own["student_states_0"][0], rtol_of_max=1e-9 if exact else 1e-4)
    for each, golden in ((each, own[f"grad0.{each}"]) for each in Table._fields):
        gradient = network.table.get_parameter(each).grad
        close(gradient, golden, rtol_of_max=1e-9 if exact else 2e-3, atol=1e-12)

    reports = []
    trained = train(stage(), FixedWeights(ONE), on_iteration=reports.append)
    losses = torch.stack([done.branch_losses.flatten() for done in reports])
    golden = own["loss"][:, -losses.shape[1] :]
    relative = ((losses - golden) / golden).abs().max()
    assert relative <= (1e-9 if exact else 1e-4)
    table = trained.model.table
    for each in Table._fields:
        final = table.get_parameter(each).detach()
        close(final, own[f"raw.{each}.final"], atol=1e-9 if exact else 1e-3)
    solver = table.solver()
    for each in Table._fields:
        decoded = torch.tensor(getattr(solver, each), dtype=torch.float64)
        close(decoded, own[each], atol=1e-9 if exact else 1e-3)
