"""Methods of several stages: each student kept at once, the next stage's teacher, resumable."""

import contextlib
import errno
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from bdense.diffusion.branches import export_branch
from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.diffusion.sampling import samplers_from
from bdense.diffusion.vp import CosineSchedule
from bdense.errors import CheckpointError, InputError, NonFiniteLossError
from bdense.execution import Execution
from bdense.methods.distill import TrainedStage, distill
from bdense.methods.method import Inputs
from bdense.methods.progressive import PDConfig, Progressive, pd_sampler, prediction_of
from bdense.methods.sfd import SFD, SFDConfig
from bdense.models.store import load_denoiser, save_denoiser
from bdense.training.loop import train
from bdense.weights.weighting import FixedWeights, LearnedWeights
from tests.contracts.methods import ALL
from tests.disks import largest_file, names
from tests.pd_nets import small_conv
from tests.small import noise_images, same_weights

TWO = torch.tensor([0.25, 0.75], dtype=torch.float64)
OTHER = Inputs(dataset=noise_images(name="x"), seed=5)


def conv(precond: str = "cosine", **options: Any) -> NetworkDenoiser:
    return small_conv(precond, dropout=0.0, **options)


def config(until: int = 2, **changes: Any) -> PDConfig:
    """8 -> 4 -> .. -> ``until``."""
    usual = {"steps": 8, "updates": 3, "batch": 4, "lr": 1e-3}
    return PDConfig(**usual | {"until": until} | changes)


def run(
    folder: Path,
    until: int = 2,
    *,
    teacher: NetworkDenoiser | None = None,
    weights: torch.Tensor = TWO,
    inputs: Inputs | None = None,
    options: dict[str, Any] | None = None,
    **knobs: Any,
) -> Iterator[TrainedStage]:
    return distill(
        Progressive(),
        teacher or conv(),
        config(until, **knobs),
        lambda: FixedWeights(weights),
        inputs or Inputs(dataset=noise_images(), seed=5),
        folder=folder,
        **{"checkpoint_seconds": 0} | (options or {}),
    )


def never(plan, done):
    raise AssertionError(f"{plan.label} trains")


def noting(seen: list[tuple[int, int]]) -> dict[str, Any]:
    """Options that note each iteration, by the stage's steps."""
    return {"on_iteration": lambda plan, done: seen.append((plan.nfe, done.iteration))}


# ---- rounds ----


def test_each_student_is_the_next_stages_teacher(tmp_path):
    """As stages by hand."""
    method, teacher = Progressive(), conv()
    inputs = Inputs(dataset=noise_images(), seed=5)
    rounds = list(run(tmp_path))
    for steps, done in zip((4, 2), rounds, strict=True):
        stage = method.stage(done.plan, teacher, config(), inputs)
        teacher = export_branch(train(stage, FixedWeights(TWO)))
        assert same_weights(done.student, teacher)
        assert (done.plan.nfe, done.path) == (steps, tmp_path / f"{steps:05d}.safetensors")
        metadata = load_denoiser(done.path)[1]
        assert samplers_from(metadata) == [pd_sampler(CosineSchedule(), steps)]
        assert (metadata["method"], metadata["weights"]) == ("pd-bdense", [0.25, 0.75])
        assert (metadata["training"]["lr"], metadata["training"]["seed"]) == (1e-3, 5)
        assert metadata == {**done.metadata} | {"training": metadata["training"]}
        card = done.path.with_suffix(".md").read_text()
        assert f"| sampler | {steps} DDIM steps, cosine levels, even in time |" in card
    assert names(tmp_path) == [
        f"{steps}.{kind}" for steps in ("00002", "00004") for kind in ("md", "safetensors")
    ]


def test_each_stage_has_weights_of_its_own(tmp_path):
    """Learned ones begin anew."""
    made: list[LearnedWeights] = []

    def weighting() -> LearnedWeights:
        made.append(LearnedWeights(2, rule="uncertainty"))
        return made[-1]

    rounds = list(
        distill(
            Progressive(),
            conv(),
            config(),
            weighting,
            Inputs(dataset=noise_images(), seed=5),
            folder=tmp_path,
        )
    )
    assert rounds[0].weighting is not rounds[1].weighting
    metadata = load_denoiser(rounds[1].path)[1]
    assert metadata["weighting"] == {"rule": "uncertainty", "strength": 1.0, "memory": 100}
    assert sum(metadata["weights"]) == pytest.approx(1)


def test_what_a_file_says_besides_is_the_callers(tmp_path):
    (done,) = run(
        tmp_path,
        until=4,
        weights=torch.ones(1),
        clip_samples=True,
        options={"metadata": {"teacher": "a.pkl", "licence": "MIT"}},
    )
    metadata = load_denoiser(done.path)[1]
    assert (metadata["method"], metadata["teacher"]) == ("pd", "a.pkl")
    assert samplers_from(metadata) == [pd_sampler(CosineSchedule(), 4, clip=True)]
    card = done.path.with_suffix(".md").read_text()
    assert "license: mit" in card
    assert "predictions clipped to [-1, 1]" in card


def test_a_method_of_one_stage_is_called_what_the_caller_says(tmp_path):
    teacher = conv("edm")
    method, short = SFD(), SFDConfig(kimg=0.008, batch=4, substeps=2)
    options: dict[str, Any] = {"checkpoint_seconds": 0}

    def once(**more: Any) -> TrainedStage:
        weights = FixedWeights(torch.ones(2))
        (done,) = distill(method, teacher, short, lambda: weights, Inputs(), **options | more)
        return done

    kept = once(folder=tmp_path, name="one")
    assert names(tmp_path) == ["one.md", "one.safetensors"]
    # Without a folder nothing is kept but the checkpoint that was named.
    path = tmp_path / "training.safetensors"
    loose = once(checkpoint=path)
    assert (loose.path, path.exists()) == (None, True)
    assert same_weights(loose.student, kept.student)
    assert samplers_from(loose.metadata) == [loose.sampler] == list(short.samplers())
    assert once(checkpoint=path, on_iteration=never).weighting.num_branches == 2
    with pytest.raises(InputError, match="progressive has 2 stages here"):
        run(None)


# ---- stopped, and carried on ----


def test_a_run_that_goes_on_further_keeps_its_rounds(tmp_path):
    *_, whole = run(tmp_path / "whole", until=1)
    (first,) = run(tmp_path / "part", until=4)
    before = first.path.read_bytes()
    seen = []
    rounds = list(run(tmp_path / "part", until=1, options=noting(seen)))
    assert [done.plan.nfe for done in rounds] == [4, 2, 1]
    assert {steps for steps, _ in seen} == {2, 1}
    assert first.path.read_bytes() == before
    assert same_weights(rounds[-1].student, whole.student)


def test_a_disk_that_is_full_at_a_rounds_end_leaves_the_last_good_round(tmp_path):
    """A real write error; then there is room again, and the same call carries on."""
    *_, whole = run(tmp_path / "whole")
    folder = tmp_path / "full"
    with contextlib.ExitStack() as full:

        def fill(plan, done):
            if (plan.nfe, done.iteration) == (2, 2):
                # A card would have room, but no weights.
                full.enter_context(largest_file(2048))

        rounds = run(folder, options={"on_iteration": fill})
        first = next(rounds)
        with pytest.raises((OSError, SafetensorError), match=f"os error {errno.EFBIG}|too large"):
            next(rounds)
    # Nothing is half written.
    assert names(folder) == ["00002.training.safetensors", "00004.md", "00004.safetensors"]
    assert same_weights(load_denoiser(first.path)[0], first.student)
    seen = []
    *_, last = run(folder, options=noting(seen))
    assert seen == [(2, 2)]
    assert same_weights(last.student, whole.student)
    assert names(folder) == names(tmp_path / "whole")


def test_a_process_that_dies_after_a_rounds_last_write_leaves_nothing_behind(tmp_path):
    (done,) = run(tmp_path, until=4)
    # As if it had died before it took its checkpoint away.
    done.path.with_suffix(".training.safetensors").write_bytes(b"checkpoint")
    (again,) = run(tmp_path, until=4, options={"on_iteration": never})
    assert same_weights(again.student, done.student)
    assert names(tmp_path) == ["00004.md", "00004.safetensors"]


def test_a_round_that_diverges_leaves_those_before_it(tmp_path):
    (first,) = run(tmp_path, until=4)
    student = first.student
    with torch.no_grad():
        next(student.parameters()).fill_(float("nan"))
    save_denoiser(first.path, student, load_denoiser(first.path)[1])
    rounds = run(tmp_path)
    assert next(rounds).plan.nfe == 4
    with pytest.raises(NonFiniteLossError, match="iteration 0, branch 1"):
        next(rounds)
    assert names(tmp_path) == ["00004.md", "00004.safetensors"]


# ---- one folder, one run ----


@pytest.mark.parametrize(
    ("changes", "differing"),
    [
        ({"weights": TWO.flip(0)}, "weights"),
        ({"lr": 2e-3, "lr_schedule": "constant"}, "anneal, lr"),
        ({"teacher": conv(precond_options={"logsnr_max": 15.0})}, "schedule, teacher"),
        ({"inputs": OTHER, "flip": True}, r"batches\.data, bat.*"),
        ({"steps": 16}, "first"),
        ({"clip_samples": True}, "clip_samples"),
        ({"teacher": conv().execute(Execution(precision="bfloat16"))}, "precision"),
    ],
)
def test_the_folder_of_another_run_is_refused(tmp_path, changes, differing):
    (done,) = run(tmp_path, until=4)
    before = done.path.read_bytes()
    message = (
        rf"{re.escape(str(done.path))} is the model of another run "
        rf"\(differs in: {differing}\); .*--force"
    )
    with pytest.raises(CheckpointError, match=message):
        run(tmp_path, until=4, **changes)
    assert done.path.read_bytes() == before
    replaced = [each.path for each in run(tmp_path, until=4, options={"replace": True}, **changes)]
    assert done.path in replaced
    assert done.path.read_bytes() != before


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "00004.safetensors"
    save_denoiser(path, conv(), {"kind": "teacher"})
    with pytest.raises(CheckpointError, match=r"00004\.safetensors is a model without"):
        run(tmp_path)
    path.write_bytes(b"cut short")
    with pytest.raises(CheckpointError, match=r"00004\.safetensors is not a model"):
        run(tmp_path)
    assert path.read_bytes() == b"cut short"
    path.unlink()
    path.symlink_to("elsewhere.safetensors")
    with pytest.raises(InputError, match=r"is a link to elsewhere"):
        run(tmp_path, options={"replace": True})


def test_what_does_not_fit_together_is_refused_at_once(tmp_path):
    with pytest.raises(InputError, match="exceed those that this cosine teacher was trained for"):
        run(tmp_path, schedule="polynomial", sigma_max=1e5)
    with pytest.raises(InputError, match="learns from images; give a data set"):
        run(tmp_path, inputs=Inputs())
    assert names(tmp_path) == []


def test_stages_of_one_nfe_are_refused(tmp_path):
    class Twice(Progressive):
        def plan(self, config, teacher=None):
            return tuple(replace(plan, nfe=2) for plan in super().plan(config, teacher))

    inputs = Inputs(dataset=noise_images())
    with pytest.raises(InputError, match=r"progressive plans stages of \[2, 2\] NFE"):
        distill(Twice(), conv(), config(), lambda: FixedWeights(TWO), inputs, folder=tmp_path)


# ---- another prediction ----


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_an_eps_teacher_is_converted_before_its_steps_are_halved(tmp_path, prediction):
    """The converting round has as many steps as the teacher, and ends near its predictions."""
    # Levels at which eps says something of the image.
    bounds = {"logsnr_min": -2.0, "logsnr_max": 2.0}
    teacher = conv()
    teacher.precond = replace(teacher.precond, prediction_type="epsilon", **bounds)
    usual: dict[str, Any] = {"updates": 60, "batch": 8, "lr": 3e-2, "prediction_type": prediction}
    inputs = Inputs(dataset=noise_images(), seed=5)

    def convert(folder: Path, seen: list[tuple[int, int]]) -> list[TrainedStage]:
        slow = noting(seen) | {"checkpoint_seconds": 60}
        return list(run(folder, until=4, teacher=teacher, inputs=inputs, options=slow, **usual))

    seen: list[tuple[int, int]] = []
    rounds = convert(tmp_path, seen)
    assert [(done.plan.nfe, done.plan.branched) for done in rounds] == [(8, False), (4, True)]
    assert [steps for steps, _ in seen] == [8] * 60 + [4] * 60
    converted = rounds[0].student
    assert prediction_of(teacher) == "epsilon"
    assert {prediction_of(done.student) for done in rounds} == {prediction}
    metadata = load_denoiser(rounds[0].path)[1]
    assert (metadata["method"], metadata["weights"]) == ("pd", [1.0])
    assert samplers_from(metadata) == [pd_sampler(CosineSchedule(**bounds), 8)]

    stage = Progressive().stage(rounds[0].plan, teacher, config(until=4, **usual), inputs)

    def distance(student: NetworkDenoiser) -> float:
        batch = stage.batch(99, ALL)
        sigma = stage.levels.grid(8)[batch.interval]
        x = batch.clean + sigma.float().view(-1, 1, 1, 1) * batch.noise
        with torch.no_grad():
            return float((student(x, sigma) - teacher(x, sigma)).square().mean())

    assert distance(converted) < 0.25 * distance(stage.start)
    seen.clear()
    assert [done.plan.nfe for done in convert(tmp_path, seen)] == [8, 4]
    assert seen == []
    # Asked for what it predicts already, a teacher is not converted.
    (alone,) = run(tmp_path / "x", until=4, prediction_type="v_prediction")
    assert alone.plan.nfe == 4
