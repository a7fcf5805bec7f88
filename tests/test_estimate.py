"""What a dry run says of a study whose teacher is published and not here yet."""

import dataclasses

import pytest

import bdense.public
import bdense.sources
import search.estimate
from bdense.checkpoints import save_denoiser
from bdense.public import CHECKPOINTS
from search.estimate import estimate
from tests.small import small_teacher
from tests.studies import spec

NAME = "edm-cifar10-32x32-uncond-vp"


@pytest.fixture
def published(tmp_path, monkeypatch):
    """The table's entry with a small network, in an empty folder, and no time to lose."""
    monkeypatch.setenv("BDENSE_CHECKPOINTS", str(tmp_path / "public"))
    monkeypatch.setenv("BDENSE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(search.estimate, "MEASURE_SECONDS", 0.01)
    small = dataclasses.replace(
        CHECKPOINTS[NAME],
        architecture=small_teacher().describe(),
        url=CHECKPOINTS[NAME].url.replace(".pkl", ".safetensors"),
        sha256=None,
    )
    for module in (bdense.public, search.estimate, bdense.sources):
        monkeypatch.setattr(module, "CHECKPOINTS", {NAME: small})
    return small


def test_the_cost_is_known_without_the_file(published):
    cost = estimate(spec(teacher={"checkpoint": NAME}))
    # NFE 2 with AFS at K = 4: two trained intervals of three; 12 teacher steps.
    assert cost.student_updates == 2560 * 2
    assert cost.teacher_evaluations == 2560 * 12
    assert cost.teacher_training == 0
    parameters = sum(p.numel() for p in small_teacher().parameters())
    assert cost.student_bytes == 4 * parameters * (3 + 2)
    assert cost.forward_seconds > 0
    assert cost.update_seconds > 0
    assert cost.lines()[-1] == (
        f"download: the launch fetches {published.url} to {published.path}; until then the "
        f"network is {NAME}'s with untrained weights, which cost the same"
    )
    assert not published.path.exists()


def test_once_it_is_here_nothing_is_said(published):
    save_denoiser(published.path, small_teacher(), {})
    cost = estimate(spec(teacher={"checkpoint": NAME}))
    assert cost.remark == ""
    assert cost.lines()[-1].startswith("time: ")
