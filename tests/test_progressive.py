"""Progressive distillation: contracts that need no golden file."""

import copy
import hashlib
import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bdense.data.datasets import Dataset, to_float
from bdense.diffusion.branches import export_branch, widen_head
from bdense.diffusion.denoiser import Denoiser, NetworkDenoiser
from bdense.diffusion.preconditioning import DDPM, Cosine
from bdense.diffusion.sampling import Sampler
from bdense.diffusion.schedules import Levels, Schedule
from bdense.diffusion.snr_weights import snr_weight
from bdense.diffusion.solvers import DDIM, trajectory
from bdense.diffusion.vp import CosineSchedule
from bdense.errors import CheckpointError, InputError, NonFiniteLossError
from bdense.methods.progressive import (
    Batch,
    DataBatches,
    PDConfig,
    branch_errors,
    dense_targets,
    distill_round,
    image_weights,
    reparameterised,
    target_shares,
)
from bdense.models.store import load_tensors
from tests.networks import image, tiny_denoiser
from tests.pd_nets import TinyConv
from tests.small import same_weights

COSINE = CosineSchedule()
ONE = torch.ones(1, dtype=torch.float64)
TWO = torch.tensor([0.3, 0.7], dtype=torch.float64)
CPU = torch.device("cpu")


class StopHereError(Exception):
    """Stands for a kill at that point."""


def images(count: int = 12, channels: int = 2) -> Dataset:
    """Bytes at random, in three classes."""
    draw = torch.Generator().manual_seed(3)
    pixels = torch.randint(256, (count, channels, 8, 8), generator=draw, dtype=torch.uint8)
    return Dataset("noise", pixels, "its-sha256", torch.arange(count) % 3)


def batches(label_dim: int = 0, **options) -> DataBatches:
    usual = {"batch": 4, "seed": 5, "device": CPU, "label_dim": label_dim}
    return DataBatches(images(), **usual | options)


def config(updates: int = 3, **options) -> PDConfig:
    return PDConfig(updates=updates, **{"batch": 4, "lr": 1e-3, "seed": 5} | options)


def teacher(**options) -> NetworkDenoiser:
    return tiny_denoiser(**{"precond": "cosine"} | options)


def conv(prediction: str = "v_prediction", hidden: int = 4, channels: int = 1) -> NetworkDenoiser:
    """Float64, 8 x 8."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TinyConv(img_channels=channels, img_resolution=8, hidden=hidden)
    return NetworkDenoiser(model.double(), Cosine(prediction_type=prediction)).eval()


@dataclass
class Noise:
    """Float64 batches of 8 images for ``conv``."""

    scale: float = 0.5

    def __call__(self, iteration: int, num_steps: int) -> Batch:
        draw = torch.Generator().manual_seed(iteration)
        clean, noise = torch.randn(2, 8, 1, 8, 8, generator=draw, dtype=torch.float64)
        return Batch(self.scale * clean, noise, torch.arange(8) % num_steps)

    def describe(self) -> dict[str, Any]:
        return {}


def four(values: Tensor) -> Tensor:
    return values.float().view(-1, 1, 1, 1)


# ---- a round ----


@pytest.mark.parametrize("label_dim", [0, 3])
def test_plain_pd_is_a_loop_written_out(label_dim):
    """Bit for bit; a conditional teacher and its student are told the classes of the images."""
    first = teacher(label_dim=label_dim)
    drawn = batches(label_dim)
    student = distill_round(first, drawn, COSINE, 4, config(), ONE)

    plain = copy.deepcopy(first)
    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-3, fused=True)
    grid, norms = COSINE.grid(8), []
    for j in range(3):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - j / 3)
        batch = drawn(j, 4)
        assert (batch.labels is None) == (label_dim == 0)
        t_0, t_1, t_2 = (grid[2 * batch.interval + k] for k in range(3))
        x = batch.clean + four(t_0) * batch.noise
        with torch.no_grad():
            D_0 = first(x, t_0, batch.labels)
            D_1 = first(D_0 + four(t_1 / t_0) * (x - D_0), t_1, batch.labels)
        # r = 1 / t; numerator and denominator times t_2, which may be 0.
        scale = 1 - t_2 / t_0
        share_0, share_1 = (t_2 / t_1 - t_2 / t_0) / scale, (1 - t_2 / t_1) / scale
        target = four(share_0) * D_0 + four(share_1) * D_1
        error = (plain(x, t_0, batch.labels) - target).square().mean(dim=(1, 2, 3))
        loss = ((t_0**-2).clamp(min=1).float() * error).mean()
        optimizer.zero_grad()
        loss.backward()
        gradients = [p.grad for p in plain.parameters()]
        norms.append(torch.stack([g.norm() for g in gradients]).norm().item())
        if norms[-1] > 1:
            for g in gradients:
                g.mul_(1 / norms[-1])
        optimizer.step()
    assert same_weights(student, plain)
    assert not same_weights(student, first)
    # Clipping was at work.
    assert max(norms) > 1


def test_the_last_branch_alone_is_plain_distillation():
    """Weight 0 for the others: to rounding, as a wider head is another product."""
    first = conv()
    alone = torch.tensor([0.0, 0.0, 0.0, 1.0])
    for kind in ("adam", "sgd"):
        four_steps = config(substeps=4, optimizer=kind)
        branched = distill_round(
            first, Noise(), COSINE, 2, replace(four_steps, num_branches=4), alone
        )
        plain = distill_round(first, Noise(), COSINE, 2, four_steps, ONE)
        last = export_branch(branched)
        for p, q in zip(last.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-12)
        assert not same_weights(plain, first)


def test_what_an_update_reports_by_hand():
    """Losses by branch, their weighted sum, the gradient's norm before clipping."""
    first, reports = conv(), []
    train = config(1, num_branches=2, loss="v", clip_norm=1e-3)
    distill_round(first, Noise(), COSINE, 4, train, TWO, on_update=reports.append)
    (report,) = reports
    batch, grid = Noise()(0, 4), COSINE.grid(8)
    levels = torch.stack([grid[2 * batch.interval + k] for k in range(3)])
    x = batch.clean + levels[0].view(-1, 1, 1, 1) * batch.noise
    student = widen_head(first, 2)
    D = student.branches(x, levels[0])
    targets = dense_targets(first, x, levels)
    errors = torch.stack([(D[:, k] - targets[k]).square().mean(dim=(1, 2, 3)) for k in (0, 1)])
    losses = ((levels[0] ** -2 + 1) * errors).mean(dim=1)
    loss = 0.3 * losses[0] + 0.7 * losses[1]
    loss.backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in student.parameters()))
    expected = losses.tolist()
    assert report.branch_losses.tolist() == pytest.approx(expected, rel=1e-10, abs=1e-20)
    # Branch 1 starts at its target, the teacher's own prediction.
    assert expected[0] < 1e-20 < 1e-8 < expected[1]
    assert report.loss == pytest.approx(loss.item(), rel=1e-10)
    assert report.gradient_norm == pytest.approx(norm, rel=1e-9)
    assert (report.iteration, report.iterations, report.lr) == (0, 1, 1e-3)


def test_a_gradient_is_clipped_to_its_norm_exactly():
    """torch's own takes the norm for 1e-6 more than it is."""
    first, reports = conv(), []
    steps = {"optimizer": "sgd", "lr": 1.0, "anneal": False}

    def moved(clip_norm: float | None) -> float:
        train = config(1, clip_norm=clip_norm, **steps)
        student = distill_round(first, Noise(), COSINE, 2, train, ONE, on_update=reports.append)
        pairs = zip(student.parameters(), first.parameters(), strict=True)
        return math.sqrt(sum(float((p - q).detach().square().sum()) for p, q in pairs))

    norm = moved(None)
    assert norm == pytest.approx(reports[0].gradient_norm, rel=1e-9)
    assert moved(norm / 3) == pytest.approx(norm / 3, rel=1e-9)
    assert moved(norm * 1.01) == norm
    assert {report.gradient_norm for report in reports} == {reports[0].gradient_norm}


def test_the_step_size_falls_to_a_last_share_or_not_at_all():
    run = config(4, lr=0.8)
    assert [run.lr_at(j) for j in range(4)] == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert [replace(run, anneal=False).lr_at(j) for j in range(4)] == [0.8] * 4
    reports = []
    distill_round(conv(), Noise(), COSINE, 2, run, ONE, on_update=reports.append)
    assert [report.lr for report in reports] == [run.lr_at(j) for j in range(4)]


def test_the_optimisers_are_three():
    """Two updates written out for sgd and adamw; adam is adamw without decay."""
    first = conv()

    def student(optimizer: str, **options) -> NetworkDenoiser:
        train = config(2, optimizer=optimizer, anneal=False, clip_norm=None, **options)
        return distill_round(first, Noise(), COSINE, 2, train, ONE)

    made = {
        "sgd": lambda p: torch.optim.SGD(p, lr=1e-3),
        "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.5),
    }
    for name, make in made.items():
        plain = copy.deepcopy(first)
        optimizer = make(plain.parameters())
        for j in range(2):
            batch, grid = Noise()(j, 2), COSINE.grid(4)
            levels = torch.stack([grid[2 * batch.interval + k] for k in range(3)])
            x = batch.clean + levels[0].view(-1, 1, 1, 1) * batch.noise
            targets = dense_targets(first, x, levels)
            errors = branch_errors(plain, x, levels[0], targets)
            optimizer.zero_grad()
            (snr_weight(levels[0], "snr_trunc") * errors).mean().backward()
            optimizer.step()
        decay = {"weight_decay": 0.5} if name == "adamw" else {}
        for p, q in zip(student(name, **decay).parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
    assert same_weights(student("adam"), student("adamw"))
    assert not same_weights(student("adamw"), student("adamw", weight_decay=0.5))


# ---- targets ----


def test_the_first_target_is_the_teachers_own_prediction():
    first = teacher()
    draw = torch.Generator().manual_seed(0)
    for substeps, num_steps in ((2, 1), (2, 5), (4, 3)):
        n = torch.arange(6) % num_steps
        k = torch.arange(substeps + 1)[:, None]
        levels = COSINE.grid(num_steps * substeps)[substeps * n + k]
        x = four(levels[0]) * torch.randn(6, 2, 8, 8, generator=draw)
        targets = dense_targets(first, x, levels)
        with torch.no_grad():
            assert torch.equal(targets[0], first(x, levels[0]))
        assert targets.shape == (substeps, 6, 2, 8, 8)


@pytest.mark.parametrize("substeps", [1, 2, 3, 5, 16])
def test_targets_are_means_of_predictions(substeps):
    """Shares of random levels: never negative, of sum 1, as r = 1 / t says."""
    draw = torch.Generator().manual_seed(substeps)
    steps = torch.rand(substeps + 1, 200, generator=draw, dtype=torch.float64) + 1e-6
    levels = (6 * steps - 4).exp().cumsum(0).flip(0)
    ends_at_0 = torch.arange(200) % 2 == 0
    levels[-1, ends_at_0] = 0
    for k, shares in enumerate(target_shares(levels), 1):
        assert shares.shape == (k, 200)
        assert bool((shares >= 0).all())
        torch.testing.assert_close(shares.sum(0), torch.ones(200, dtype=torch.float64))
        r = 1 / levels[: k + 1, ~ends_at_0]
        expected = r.diff(dim=0) / (r[-1] - r[0])
        torch.testing.assert_close(shares[:, ~ends_at_0], expected, rtol=1e-8, atol=1e-10)
    last = target_shares(levels)[-1][:, ends_at_0]
    assert last.tolist() == [[0.0] * 100] * (substeps - 1) + [[1.0] * 100]


def gauss(x: Tensor, sigma: Tensor) -> Tensor:
    """The exact D where every pixel is N(0.2, 0.5^2)."""
    variance = sigma.to(x).view(-1, 1, 1, 1) ** 2
    return 0.2 + 0.25 * (x - 0.2) / (0.25 + variance)


def ideal(schedule: Levels, num_steps: int, substeps: int) -> Denoiser:
    """The student whose D is D*^K at every level of its grid."""
    fine = schedule.grid(num_steps * substeps)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        at = int((fine - sigma).abs().argmin())
        levels = fine[at : at + substeps + 1, None].expand(-1, len(x))
        return dense_targets(gauss, x, levels)[-1]

    return denoise


@pytest.mark.parametrize(
    "schedule",
    [COSINE, Schedule(), Schedule(kind="logsnr", sigma_max=20.0), Schedule(sigma_min=1.0)],
    ids=["cosine", "polynomial", "logsnr", "high-end"],
)
@pytest.mark.parametrize("substeps", [2, 3, 4])
def test_an_ideal_student_lands_where_the_teachers_steps_do(schedule, substeps):
    """Whether the last level is 0 or above it."""
    noise = torch.randn(
        4, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    walk = trajectory(DDIM(), gauss, schedule.start(noise), schedule.grid(3 * substeps))
    sampler = Sampler(num_intervals=3, afs=False, schedule=schedule, solver=DDIM())
    end = sampler(ideal(schedule, 3, substeps), noise)
    torch.testing.assert_close(end, walk[-1], rtol=1e-10, atol=1e-11)
    # And each branch where as many steps do, in every interval.
    fine = schedule.grid(3 * substeps)
    for n in range(3):
        levels, x = fine[substeps * n : substeps * (n + 1) + 1], walk[substeps * n]
        targets = dense_targets(gauss, x, levels[:, None].expand(-1, len(x)))
        for k in range(1, substeps + 1):
            landed = targets[k - 1] + levels[k] / levels[0] * (x - targets[k - 1])
            expected = walk[substeps * n + k]
            torch.testing.assert_close(landed, expected, rtol=1e-10, atol=1e-10)


def test_clipped_predictions_keep_targets_between_minus_1_and_1():
    x = 3 * torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    levels = torch.tensor([2.0, 1.0, 0.5, 0.0], dtype=torch.float64)[:, None].expand(-1, 6)

    def wide(x: Tensor, sigma: Tensor) -> Tensor:
        return 2 * x

    targets = dense_targets(wide, x, levels, clip=True)
    assert bool((targets.abs() <= 1).all())
    # The second state follows from the clipped prediction.
    first = (2 * x).clamp(-1, 1)
    second = (2 * (first + 0.5 * (x - first))).clamp(-1, 1)
    torch.testing.assert_close(targets[1], first / 3 + second * 2 / 3)
    assert float(dense_targets(wide, x, levels).abs().max()) > 1


# ---- weights ----


def test_the_space_of_states_multiplies_by_the_way_moved_and_keeps_the_sum():
    levels = torch.tensor([[4.0, 8.0], [3.0, 2.0], [1.0, 0.0]], dtype=torch.float64)
    weights = torch.tensor([2.0, 6.0])
    # 1 - t_k / t_0 is 1/4, 3/4 and 3/4, 1: 0.5 and 4.5, times 8 / 5; 1.5 and 6, times 8 / 7.5.
    moved = image_weights(weights, levels, "state")
    assert moved.flatten().tolist() == pytest.approx([0.8, 1.6, 7.2, 6.4])
    assert image_weights(weights, levels, "clean").tolist() == [[2.0, 2.0], [6.0, 6.0]]
    # One branch is the step's end, whatever the space.
    assert image_weights(torch.tensor([5.0]), levels, "state").tolist() == [[5.0, 5.0]]


def test_a_round_uses_the_space_it_is_told():
    first = conv()

    def run(space: str) -> tuple[NetworkDenoiser, float]:
        reports = []
        train = config(1, num_branches=2, weights_space=space)
        student = distill_round(first, Noise(), COSINE, 4, train, TWO, on_update=reports.append)
        return student, reports[0].loss

    batch, grid = Noise()(0, 4), COSINE.grid(8)
    levels = torch.stack([grid[2 * batch.interval + k] for k in range(3)])
    x = batch.clean + levels[0].view(-1, 1, 1, 1) * batch.noise
    targets = dense_targets(first, x, levels)
    with torch.no_grad():
        losses = snr_weight(levels[0], "snr_trunc") * branch_errors(
            widen_head(first, 2), x, levels[0], targets
        )
    factors = 1 - levels[1:] / levels[0]
    by_hand = TWO[:, None] * factors / (TWO[:, None] * factors).sum(0)
    (state, state_loss), (clean, clean_loss) = run("state"), run("clean")
    assert state_loss == pytest.approx(float((by_hand * losses).sum(0).mean()), rel=1e-9)
    assert clean_loss == pytest.approx(float((TWO[:, None] * losses).sum(0).mean()), rel=1e-9)
    assert not same_weights(state, clean)


# ---- stopped and resumed ----


@pytest.mark.parametrize(
    ("optimizer", "stop_after"), [("adam", 1), ("adam", 3), ("adam", 5), ("adamw", 4), ("sgd", 3)]
)
def test_stopped_and_resumed_is_never_stopped(tmp_path, optimizer, stop_after):
    first = teacher(dropout=0.3)
    decay = {"weight_decay": 0.1} if optimizer == "adamw" else {}
    train = config(5, num_branches=2, optimizer=optimizer, dropout=True, flip=True, **decay)
    run = (first, batches(flip=True), COSINE, 4, train, TWO)
    whole = distill_round(*run)

    def stop(report):
        if report.iteration + 1 == stop_after:
            raise StopHereError

    path = tmp_path / "round.safetensors"
    with pytest.raises(StopHereError):
        distill_round(*run, checkpoint=path, checkpoint_seconds=0, on_update=stop)
    kept = load_tensors(path)[1]["iteration"] if path.exists() else 0
    assert kept == stop_after - 1
    torch.manual_seed(99)  # the global state of the new process is another one
    seen = []
    resumed = distill_round(*run, checkpoint=path, on_update=seen.append)
    assert same_weights(resumed, whole)
    assert [report.iteration for report in seen] == list(range(stop_after - 1, 5))


def test_a_checkpoint_of_another_round_is_refused(tmp_path):
    first, keep = conv(), {"checkpoint": tmp_path / "x.safetensors", "checkpoint_seconds": 0}
    train = config(2, num_branches=2)
    run = {"teacher": first, "batches": Noise(), "schedule": COSINE, "num_steps": 4}
    distill_round(**run, config=train, weights=TWO, **keep)
    other = CosineSchedule(logsnr_max=15.0)
    for change, message in (
        ({"weights": TWO.flip(0)}, "differs in: weights"),
        ({"config": replace(train, lr=1e-4, loss="snr")}, r"config\.loss, config\.lr"),
        ({"num_steps": 8}, "differs in: num_steps"),
        ({"schedule": other}, "differs in: schedule"),
        ({"teacher": conv("sample"), "start": first}, "differs in: start, teacher"),
        ({"start": reparameterised(first, "sample")}, "differs in: start"),
        ({"batches": batches()}, r"batches\.batch, batches\.data, batches\.flip, batches\.seed"),
    ):
        with pytest.raises(CheckpointError, match=message):
            distill_round(**run | {"config": train, "weights": TWO, **keep} | change)
    starts = [reparameterised(first, prediction) for prediction in ("sample", "epsilon")]
    run |= {"config": train, "weights": TWO, "checkpoint": tmp_path / "y.safetensors"}
    distill_round(**run, start=starts[0], checkpoint_seconds=0)
    with pytest.raises(CheckpointError, match="differs in: start"):
        distill_round(**run, start=starts[1])


# ---- dropout, failures, refusals ----


def test_dropout_is_seeded_and_off_unless_asked_for():
    first = teacher(dropout=0.5)

    def student(**options) -> NetworkDenoiser:
        torch.rand(1)  # another global state
        return distill_round(first, batches(), COSINE, 4, config(2, **options), ONE)

    before = torch.random.get_rng_state()
    on = student(dropout=True)
    torch.random.set_rng_state(before)
    torch.rand(7)
    assert same_weights(on, student(dropout=True))
    assert not same_weights(on, student())
    assert same_weights(student(), student())
    assert not on.training


def test_what_is_not_finite_is_named_before_an_update_is_made(tmp_path, monkeypatch):
    first, path = conv(), tmp_path / "x.safetensors"
    keep = {"checkpoint": path, "checkpoint_seconds": 0}
    wild = config(3, optimizer="sgd", lr=1e200, anneal=False, num_branches=2, clip_norm=None)
    with pytest.raises(
        NonFiniteLossError, match=r"the loss .* at iteration 1, branch 1"
    ) as caught:
        distill_round(first, Noise(), COSINE, 2, wild, TWO, **keep)
    assert (caught.value.iteration, caught.value.branch) == (1, 1)
    assert load_tensors(path)[1]["iteration"] == 1
    # A loss may be finite, and its gradient's norm not.
    with pytest.raises(NonFiniteLossError, match="the gradient is not finite at iteration 0") as g:
        distill_round(first, Noise(), COSINE, 2, config(), 1e200 * ONE)
    assert g.value.branch is None

    def broken(*arguments, **options):
        targets = dense_targets(*arguments, **options)
        targets[1, 3] = math.inf
        return targets

    monkeypatch.setattr("bdense.methods.progressive.dense_targets", broken)
    with pytest.raises(NonFiniteLossError, match=r"the loss .* at iteration 0, branch 2"):
        distill_round(first, Noise(), COSINE, 2, config(num_branches=2), TWO)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"updates": 0}, "updates must be at least 1, got 0"),
        ({"substeps": 0}, "substeps must be at least 1, got 0"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"optimizer": "lion"}, "optimizer 'lion' is unknown; choose from adam, adamw, sgd"),
        ({"loss": "l1"}, "loss 'l1' is unknown; choose from constant, snr, snr_trunc, v"),
        ({"weights_space": "x"}, "weights_space 'x' is unknown; choose from clean, state"),
        ({"num_branches": 3}, r"num_branches=3 fits neither plain PD \(1\) .*\(substeps=2\)"),
        ({"lr": 0.0}, "lr must be positive and finite, got 0.0"),
        ({"lr": math.inf}, "lr must be positive and finite, got inf"),
        ({"lr": math.nan}, "lr must be positive and finite, got nan"),
        ({"weight_decay": 0.1}, "weight_decay=0.1 with optimizer='adam': only adamw has any"),
        ({"weight_decay": -0.1, "optimizer": "adamw"}, "a finite number from 0 up"),
        ({"weight_decay": math.nan, "optimizer": "adamw"}, "weight_decay=nan"),
        ({"clip_norm": 0.0}, "clip_norm must be positive, got 0.0; None clips not"),
        ({"clip_norm": math.nan}, "clip_norm must be positive, got nan"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(InputError, match=message):
        PDConfig(**{"updates": 1} | options)


def test_what_does_not_fit_together_is_refused():
    first, train = conv(), config(num_branches=2)

    def run(weights: Tensor, num_steps: int = 4, schedule: Levels = COSINE) -> None:
        distill_round(first, Noise(), schedule, num_steps, train, weights)

    with pytest.raises(InputError, match="3 branch weights for num_branches=2; give one for each"):
        run(torch.ones(3))
    for bad in ([1.0, math.inf], [math.nan, 1.0], [-1.0, 2.0], [0.0, 0.0]):
        with pytest.raises(InputError, match="finite, not negative and not all 0, got"):
            run(torch.tensor(bad))
    with pytest.raises(InputError, match="at least 1 step, got 0"):
        run(TWO, 0)
    with pytest.raises(InputError, match="4 branches already"):
        distill_round(widen_head(first, 4), Noise(), COSINE, 4, train, TWO)
    ddpm = tiny_denoiser(precond="ddpm")
    with pytest.raises(
        InputError,
        match=r"polynomial levels from 80 to 0\.006 exceed those that this ddpm teacher was "
        r"trained for, 0\.01 to 157\.4; choose a schedule inside them",
    ):
        distill_round(ddpm, batches(), Schedule(), 4, train, TWO)


# ---- another prediction ----


def test_a_copy_is_taken_to_predict_something_else():
    first = teacher()
    taken = reparameterised(first, "sample")
    assert taken.precond == Cosine(prediction_type="sample")
    assert first.precond == Cosine(prediction_type="v_prediction")
    assert same_weights(taken, first)
    x, sigma = image(2), torch.tensor([0.5, 3.0])
    with torch.no_grad():
        c = first.precond(sigma.view(-1, 1, 1, 1))
        raw = (first(x, sigma) - c.skip * x) / c.out
        torch.testing.assert_close(taken(x, sigma), raw, rtol=1e-4, atol=1e-5)
    assert reparameterised(tiny_denoiser(precond="ddpm"), "sample").precond == DDPM(
        prediction_type="sample"
    )
    with pytest.raises(InputError, match="precond='edm' is not converted to sample; only those"):
        reparameterised(tiny_denoiser(), "sample")
    with pytest.raises(InputError, match=r"prediction_type must be one of .*, got 'score'"):
        reparameterised(first, "score")


# ---- batches ----


def same(a: Batch, b: Batch) -> bool:
    names = ("clean", "noise", "interval", "labels")
    pairs = [(getattr(a, name), getattr(b, name)) for name in names]
    return all(x is y is None or torch.equal(x, y) for x, y in pairs)


def test_two_arms_see_the_same_batches_reached_in_any_order():
    one, other = batches(3), batches(3)
    forward = [one(j, 4) for j in range(5)]
    for j in (4, 1, 3, 0, 2):
        assert same(other(j, 4), forward[j])
    assert not torch.equal(forward[0].noise, forward[1].noise)
    # Each round draws its own.
    assert not torch.equal(one(0, 4).noise, one(0, 8).noise)
    assert not torch.equal(one(0, 4).noise, batches(3, seed=6)(0, 4).noise)


def test_batches_are_images_of_the_set_with_their_classes():
    dataset = images()
    clean = to_float(dataset.images)
    drawn = [batches(3)(j, 4) for j in range(30)]
    seen = set()
    for batch in drawn:
        for pixels, label in zip(batch.clean, batch.labels, strict=True):
            (which,) = (clean == pixels).flatten(1).all(1).nonzero().flatten().tolist()
            assert label.tolist() == [float(c == which % 3) for c in range(3)]
            seen.add(which)
    assert seen == set(range(12))
    intervals = torch.cat([batch.interval for batch in drawn])
    assert intervals.unique().tolist() == [0, 1, 2, 3]
    noise = torch.stack([batch.noise for batch in drawn])
    assert float(noise.mean()) == pytest.approx(0, abs=0.03)
    assert float(noise.std()) == pytest.approx(1, abs=0.03)


def test_flips_mirror_half_of_the_images_and_nothing_else():
    plain, flipped = batches(batch=64), batches(batch=64, flip=True)
    before, after = plain(0, 4), flipped(0, 4)
    assert torch.equal(before.noise, after.noise)
    assert torch.equal(before.interval, after.interval)
    kept = (before.clean == after.clean).flatten(1).all(1)
    mirrored = (before.clean.flip(-1) == after.clean).flatten(1).all(1)
    assert bool((kept ^ mirrored).all())
    assert 16 < int(mirrored.sum()) < 48


def test_descriptions_differ_where_batches_do():
    described = [
        batches(**options).describe()
        for options in (
            {},
            {"seed": 6},
            {"batch": 8},
            {"flip": True},
            {"label_dim": 3},
        )
    ]
    for i, one in enumerate(described):
        assert all((one == other) == (i == j) for j, other in enumerate(described))
    labels = hashlib.sha256(b"[12]" + images().labels.numpy().tobytes()).hexdigest()
    assert described[-1]["labels"] == labels
    with pytest.raises(InputError, match="'noise' has 3 classes and the network label_dim=2"):
        batches(2)
