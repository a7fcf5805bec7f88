"""Chains of progressive distillation: each round kept, carried on, and of one chain alone."""

import contextlib
import errno
import re
import resource
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bdense.methods.chain import Chain, Round, distill_chain, pd_sampler, prediction_of
from safetensors import SafetensorError

from bdense.data.datasets import Dataset
from bdense.diffusion.branches import export_branch
from bdense.diffusion.denoiser import NetworkDenoiser, build_denoiser
from bdense.diffusion.sampling import samplers_from
from bdense.diffusion.schedules import Schedule
from bdense.diffusion.vp import CosineSchedule
from bdense.errors import CheckpointError, InputError, NonFiniteLossError
from bdense.execution import Execution
from bdense.methods.progressive import DataBatches, PDConfig, distill_round, reparameterised
from bdense.models.store import load_denoiser, load_tensors, save_denoiser
from tests.networks import tiny_denoiser
from tests.small import same_weights

COSINE = CosineSchedule()
TWO = torch.tensor([0.25, 0.75], dtype=torch.float64)
CONFIG = PDConfig(updates=3, num_branches=2, batch=4, lr=1e-3, seed=5)


class StopHereError(Exception):
    """Stands for a kill at that point."""


def conv(prediction: str = "v_prediction", seed: int = 0) -> NetworkDenoiser:
    """A tiny network of 1 x 8 x 8 images."""
    import tests.pd_nets  # noqa: F401  makes it known

    description = {
        "precond": "cosine",
        "prediction_type": prediction,
        "network": "TinyConv",
        "config": {"img_channels": 1, "img_resolution": 8, "hidden": 8},
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        denoiser = build_denoiser(description)
        for parameter in denoiser.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return denoiser.eval()


def batches(**options) -> DataBatches:
    draw = torch.Generator().manual_seed(3)
    pixels = torch.randint(256, (12, 1, 8, 8), generator=draw, dtype=torch.uint8)
    usual = {"batch": 4, "seed": 5, "device": torch.device("cpu")}
    return DataBatches(Dataset("noise", pixels, "its-sha256"), **usual | options)


def run(folder: Path, last: int = 2, **changes) -> Iterator[Round]:
    """8 -> 4 -> .. -> ``last``."""
    usual = {
        "teacher": conv(),
        "batches": batches(),
        "schedule": COSINE,
        "chain": Chain(first=8, last=last),
        "config": CONFIG,
        "weights": TWO,
    }
    return distill_chain(**{"checkpoint_seconds": 0} | usual | changes, folder=folder)


def never(steps, done):
    raise AssertionError(f"round {steps} trains")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- numbers of steps ----


def test_a_chain_divides_its_steps():
    assert Chain(first=64, last=4).students == (32, 16, 8, 4)
    assert Chain(first=1024, last=128).students == (512, 256, 128)
    assert Chain(first=162, last=6, substeps=3).students == (54, 18, 6)
    assert Chain(first=4, last=1, substeps=4).students == (1,)


@pytest.mark.parametrize(
    ("first", "last", "substeps", "message"),
    [
        (64, 6, 3, "64 steps do not become 6 by dividing by K=3 again and again; start at 54"),
        (64, 6, 2, r"by K=2 again and again; end at 32 or 16 or 8 or 4, or start at 48"),
        (6, 4, 2, "6 steps do not become 4 .*; end at 3, or start at 8"),
        (96, 1, 2, "; end at 48 or 24 or 12 or 6 or 3, or start at 128"),
        (8, 8, 2, "goes down from the teacher's steps to 1 or more, got 8 to 8"),
        (4, 8, 2, "got 4 to 8"),
        (8, 0, 2, "got 8 to 0"),
        (8, -2, 2, "got 8 to -2"),
        (8, 4, 1, r"substeps \(K\) of a chain must be at least 2, got 1"),
    ],
)
def test_what_does_not_divide_is_refused_with_what_would(first, last, substeps, message):
    with pytest.raises(InputError, match=message):
        Chain(first=first, last=last, substeps=substeps)


# ---- rounds ----


def test_each_student_is_the_next_rounds_teacher(tmp_path):
    """As rounds by hand; each is kept with its card, and read back without training."""
    seen = []
    rounds = list(
        run(tmp_path, on_update=lambda steps, done: seen.append((steps, done.iteration)))
    )
    assert seen == [(steps, j) for steps in (4, 2) for j in range(3)]
    teacher = conv()
    for steps, done in zip((4, 2), rounds, strict=True):
        branched = distill_round(teacher, batches(), COSINE, steps, CONFIG, TWO)
        teacher = export_branch(branched)
        assert (done.steps, done.path) == (steps, tmp_path / f"{steps:05d}.safetensors")
        assert same_weights(done.student, teacher)
        assert done.student.describe() == conv().describe()
        assert not done.student.training
        kept, metadata = load_denoiser(done.path)
        assert same_weights(kept, teacher)
        assert samplers_from(metadata) == [pd_sampler(COSINE, steps)]
        assert (metadata["kind"], metadata["method"]) == ("student", "pd-bdense")
        assert (metadata["weights"], metadata["training"]["lr"]) == ([0.25, 0.75], 1e-3)
        card = done.path.with_suffix(".md").read_text()
        assert f"| sampler | {steps} DDIM steps, cosine levels, even in time |" in card
    assert names(tmp_path) == [
        f"{steps}.{kind}" for steps in ("00002", "00004") for kind in ("md", "safetensors")
    ]
    for again, done in zip(run(tmp_path, on_update=never), rounds, strict=True):
        assert (again.steps, again.path) == (done.steps, done.path)
        assert same_weights(again.student, done.student)


def test_what_a_file_says_besides_is_the_callers(tmp_path):
    plain = replace(CONFIG, num_branches=1)
    (done,) = run(
        tmp_path,
        last=4,
        config=plain,
        weights=torch.ones(1),
        clip_samples=True,
        metadata={"teacher": "a.pkl", "licence": "MIT"},
    )
    metadata = load_denoiser(done.path)[1]
    assert (metadata["method"], metadata["teacher"]) == ("pd", "a.pkl")
    assert samplers_from(metadata) == [pd_sampler(COSINE, 4, clip=True)]
    card = done.path.with_suffix(".md").read_text()
    assert "license: mit" in card
    assert "predictions clipped to [-1, 1]" in card


def test_a_chain_on_levels_that_end_above_0(tmp_path):
    """Karras's schedule, with a network that has no process of its own."""
    teacher = tiny_denoiser(img_channels=1)
    rounds = list(run(tmp_path, teacher=teacher, schedule=Schedule()))
    first = distill_round(teacher, batches(), Schedule(), 4, CONFIG, TWO)
    assert same_weights(rounds[0].student, export_branch(first))
    (sampler,) = samplers_from(load_denoiser(rounds[1].path)[1])
    assert (sampler.schedule, sampler.num_intervals, sampler.afs) == (Schedule(), 2, False)
    assert prediction_of(teacher) is None
    with pytest.raises(InputError, match="precond='edm' is not converted to sample"):
        run(tmp_path / "x", teacher=teacher, schedule=Schedule(), prediction_type="sample")


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("stop_at", [0, 1, 2])
def test_stopped_in_the_second_round_and_resumed_is_never_stopped(tmp_path, optimizer, stop_at):
    train = replace(CONFIG, optimizer=optimizer)
    *_, whole = run(tmp_path / "whole", config=train)

    def stop(steps, done):
        if (steps, done.iteration) == (2, stop_at):
            raise StopHereError

    with pytest.raises(StopHereError):
        list(run(tmp_path, config=train, on_update=stop))
    unfinished = tmp_path / "00002.training.safetensors"
    assert unfinished.exists() == (stop_at > 0)
    assert not stop_at or load_tensors(unfinished)[1]["iteration"] == stop_at
    seen = []
    *_, resumed = run(
        tmp_path, config=train, on_update=lambda steps, done: seen.append((steps, done.iteration))
    )
    assert seen == [(2, j) for j in range(stop_at, 3)]
    assert same_weights(resumed.student, whole.student)
    assert same_weights(load_denoiser(resumed.path)[0], whole.student)
    assert not unfinished.exists()


def test_a_chain_that_goes_on_further_keeps_its_rounds(tmp_path):
    *_, whole = run(tmp_path / "whole", last=1)
    (first,) = run(tmp_path / "part", last=4)
    before = first.path.read_bytes()
    trained = set()
    rounds = list(run(tmp_path / "part", last=1, on_update=lambda steps, _: trained.add(steps)))
    assert [done.steps for done in rounds] == [4, 2, 1]
    assert trained == {2, 1}
    assert first.path.read_bytes() == before
    assert same_weights(rounds[-1].student, whole.student)


@contextlib.contextmanager
def small_files(largest: int) -> Iterator[None]:
    """Let no file of this process grow beyond that many bytes: writing more is an error."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("checkpoint_seconds", "left", "trained"),
    [
        # The last checkpoint is what finds no room, or else the student itself.
        (0, "00002.training.safetensors", [2]),
        (1000, "00002.md", [0, 1, 2]),
    ],
)
def test_a_disk_that_is_full_at_a_rounds_end_leaves_the_last_good_round(
    tmp_path, checkpoint_seconds, left, trained
):
    """A real write error; then there is room again, and the same call carries on."""
    *_, whole = run(tmp_path / "whole")
    folder = tmp_path / "full"
    with contextlib.ExitStack() as full:

        def fill(steps, done):
            if (steps, done.iteration) == (2, 2):
                # 2 kB hold a card, but no weights.
                full.enter_context(small_files(2048))

        rounds = run(folder, on_update=fill, checkpoint_seconds=checkpoint_seconds)
        first = next(rounds)
        with pytest.raises((OSError, SafetensorError), match=f"os error {errno.EFBIG}|too large"):
            next(rounds)
    # Nothing is half written.
    assert names(folder) == [left, "00004.md", "00004.safetensors"]
    assert same_weights(load_denoiser(first.path)[0], first.student)
    seen = []
    *_, last = run(folder, on_update=lambda steps, done: seen.append((steps, done.iteration)))
    assert seen == [(2, j) for j in trained]
    assert same_weights(last.student, whole.student)
    assert names(folder) == names(tmp_path / "whole")


def test_a_process_that_dies_after_a_rounds_last_write_leaves_nothing_behind(tmp_path):
    (done,) = run(tmp_path, last=4)
    # As if it had died before it took its checkpoint away.
    done.path.with_suffix(".training.safetensors").write_bytes(b"checkpoint")
    (again,) = run(tmp_path, last=4, on_update=never)
    assert same_weights(again.student, done.student)
    assert names(tmp_path) == ["00004.md", "00004.safetensors"]


def test_a_round_that_diverges_leaves_those_before_it(tmp_path):
    (first,) = run(tmp_path, last=4)
    student = first.student
    with torch.no_grad():
        next(student.parameters()).fill_(float("nan"))
    metadata = load_denoiser(first.path)[1]
    save_denoiser(first.path, student, metadata)
    rounds = run(tmp_path)
    assert next(rounds).steps == 4
    with pytest.raises(NonFiniteLossError, match="iteration 0, branch 1"):
        next(rounds)
    assert names(tmp_path) == ["00004.md", "00004.safetensors"]


# ---- of one chain alone ----


@pytest.mark.parametrize(
    ("changes", "differing"),
    [
        ({"weights": TWO.flip(0)}, "weights"),
        ({"config": replace(CONFIG, lr=2e-3, anneal=False)}, r"config\.anneal, config\.lr"),
        ({"teacher": conv(seed=1)}, "teacher"),
        ({"schedule": CosineSchedule(logsnr_max=15.0)}, "schedule"),
        ({"batches": batches(seed=6, flip=True)}, r"batches\.flip, batches\.seed"),
        ({"chain": Chain(first=16, last=4)}, "first"),
        ({"clip_samples": True}, "clip_samples"),
        ({"prediction_type": "sample", "chain": Chain(first=4, last=2)}, "first, prediction_type"),
        ({"teacher": conv().execute(Execution(precision="bfloat16"))}, "precision"),
    ],
)
def test_the_folder_of_another_chain_is_refused(tmp_path, changes, differing):
    (done,) = run(tmp_path, last=4)
    before = done.path.read_bytes()
    message = (
        rf"{re.escape(str(done.path))} is a round of another chain \(differs in: {differing}\); "
        "give this one a folder of its own or delete that one's files"
    )
    with pytest.raises(CheckpointError, match=message):
        run(tmp_path, last=4, **changes)
    assert done.path.read_bytes() == before


def test_a_file_of_something_else_is_refused(tmp_path):
    save_denoiser(tmp_path / "00004.safetensors", conv(), {"kind": "teacher"})
    with pytest.raises(CheckpointError, match="is a round of another chain"):
        run(tmp_path)
    (tmp_path / "00004.safetensors").write_bytes(b"cut short")
    with pytest.raises(CheckpointError, match=r"00004\.safetensors cannot be read"):
        run(tmp_path)


def test_what_does_not_fit_together_is_refused_at_once(tmp_path):
    wide = replace(CONFIG, substeps=4, num_branches=1)
    with pytest.raises(InputError, match="substeps=4 are not the chain's K=2"):
        run(tmp_path, config=wide, weights=torch.ones(1))
    with pytest.raises(InputError, match="exceed those that this cosine teacher was trained for"):
        run(tmp_path, schedule=Schedule(sigma_max=1e5))
    assert names(tmp_path) == []


# ---- another prediction ----


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_an_eps_teacher_is_converted_before_its_steps_are_halved(tmp_path, prediction):
    """The converting round has as many steps as the teacher, and ends near its predictions."""
    teacher = conv("epsilon")
    train = PDConfig(updates=60, num_branches=2, batch=8, lr=3e-2, seed=5)
    # Levels at which eps says something of the image.
    bounds = {"logsnr_min": -2.0, "logsnr_max": 2.0}
    teacher.precond, schedule = replace(teacher.precond, **bounds), CosineSchedule(**bounds)
    change = {
        "teacher": teacher,
        "batches": batches(batch=8),
        "config": train,
        "schedule": schedule,
        "prediction_type": prediction,
        "checkpoint_seconds": 60,
    }
    seen = []
    rounds = list(run(tmp_path, last=4, on_update=lambda steps, _: seen.append(steps), **change))
    assert [done.steps for done in rounds] == [8, 4]
    assert seen == [8] * 60 + [4] * 60
    converted = rounds[0].student
    assert prediction_of(teacher) == "epsilon"
    assert {prediction_of(done.student) for done in rounds} == {prediction}
    # A plain round of K = 1, from the teacher's weights taken for something else.
    alone = replace(train, substeps=1, num_branches=1)
    start = reparameterised(teacher, prediction)
    by_hand = distill_round(
        teacher, batches(batch=8), schedule, 8, alone, torch.ones(1), start=start
    )
    assert same_weights(converted, by_hand)
    metadata = load_denoiser(rounds[0].path)[1]
    assert (metadata["method"], metadata["weights"]) == ("pd", [1.0])
    assert samplers_from(metadata) == [pd_sampler(schedule, 8)]

    def distance(student: NetworkDenoiser) -> float:
        batch = batches(batch=64)(99, 8)
        sigma = schedule.grid(8)[batch.interval]
        x = batch.clean + sigma.float().view(-1, 1, 1, 1) * batch.noise
        with torch.no_grad():
            return float((student(x, sigma) - teacher(x, sigma)).square().mean())

    assert distance(converted) < 0.25 * distance(start)
    again = list(run(tmp_path, last=4, on_update=never, **change))
    assert [done.steps for done in again] == [8, 4]
    # Asked for what it predicts already, a teacher is not converted.
    (alone,) = run(tmp_path / "x", last=4, prediction_type="v_prediction")
    assert alone.steps == 4
