"""Studies of given arms: launched, confirmed, promoted, transferred, from a user's seat."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bdense.models.store import denoiser_sha256, load_denoiser
from tests.commands import bdense
from tests.e2e.study import SMALL, Workplace, small_study

PAPER = {"a": 1.386, "b": -4.274}
# Three trials of ten updates; given arms of progressive distillation, 8 -> 4 -> 2 steps.
STUDY: dict[str, Any] = small_study(method={"kimg": 0.64})
PD: dict[str, Any] = small_study(
    name="promote-small",
    teacher={"train": {**SMALL["teacher"]["train"], "precond": {"name": "cosine"}}},
    method={"name": "progressive", "steps": 8, "until": 2, "updates": 5, "batch": 32, "lr": 3e-4},
    weights={"name": "normalised", "a": {"low": -0.5, "high": 3.0}},
)
PD["plan"] = {"arms": ["plain", "uniform"], "seeds": [0, 1]}


def student(workplace: Workplace, trial: Any) -> str:
    """Hash of a row's student."""
    path = workplace.runs / trial.user_attrs["student"]
    return denoiser_sha256(load_denoiser(path)[0])


def exported(folder: Path) -> tuple[str, dict[str, Any]]:
    """Hash and metadata of a model folder, which `bdense sample` draws from."""
    model, metadata = load_denoiser(folder / "model.safetensors")
    answer = bdense("sample", folder, "--out", folder.parent / "drawn.png")
    assert answer.status == 0, answer.err
    with Image.open(folder.parent / "drawn.png") as picture:
        assert picture.size[0] >= 64
    return denoiser_sha256(model), metadata


@pytest.fixture(scope="module")
def launched(tmp_path_factory, cache) -> Workplace:
    """A search of three trials, without Ray, and its confirmation: two candidates, three seeds."""
    workplace = Workplace(tmp_path_factory.mktemp("launched"), cache)
    workplace.work(STUDY)
    refused = workplace.refused("promote", "small", "--to", workplace.write(PD))
    assert "only a best of n" in refused
    out = workplace.ran("confirm", "small", "--candidates", "2", "--seeds", "3")
    assert out.startswith("small.confirm: 12 of 12 rows complete, 0 pruned, 0 failed, 0 running")
    return workplace


def winner(workplace: Workplace) -> dict[str, Any]:
    return workplace.json("best", "small")["confirmed"]["winner"]


def arm_of(trial: Any) -> str:
    """A row's arm, as `--arm` names it or by its weights' name."""
    return {"plain SFD": "plain", "plain PD": "plain", "uniform weights": "uniform"}.get(
        trial.user_attrs["arm"], trial.user_attrs["arm"]
    )


@pytest.mark.slow
def test_the_best_is_confirmed(launched):
    found = launched.json("best", "small")["confirmed"]
    assert (found["ended"], found["kimg"]) == (True, 0.64)
    assert found["winner"]["trial"] in {arm["trial"] for arm in found["arms"][2:]}
    assert [sorted(arm["fids"]) for arm in found["arms"]] == [["1", "2", "3"]] * 4
    # Fresh seeds: other students than the search's, and other latents.
    searched = {trial.value for trial in launched.rows("small")}
    for trial in launched.rows("small.confirm"):
        seed = trial.params["seed"]
        assert trial.user_attrs["fid"]["seeds"] == {"training": seed, "evaluation": seed}
        assert trial.value not in searched
    again = launched.command("confirm", "small", "--candidates", "2", "--seeds", "3")
    assert again.err == "small.confirm is complete; nothing is left to do\n"
    # It goes by its own name too.
    assert launched.json("status", "small.confirm")["trials"]["complete"] == 12
    launched.done("report", "small.confirm", "--out", "shown")
    page = (launched.folder / "shown/report.md").read_text()
    assert page.count("![") == 5  # the plot, and a grid of each arm
    arm = launched.json("best", "small")["recommended"]["arm"]
    row = next(t for t in launched.rows("small.confirm") if arm_of(t) == arm)
    for study, folder in (("small.confirm", "of-rows"), ("small", "of-search")):
        launched.done("export", study, folder)
        assert exported(launched.folder / folder)[0] == student(launched, row)


@pytest.mark.slow
def test_a_confirmed_winner_is_promoted_with_another_method(launched):
    file, name = launched.write(PD), winner(launched)["name"]
    out = launched.ran("promote", "small", "--to", file, "--arm", "weights")
    assert "promote-small: 6 of 6 rows complete, 0 pruned, 0 failed, 0 running" in out
    assert "becomes w_2/w_1 = " in out
    trials = launched.rows("promote-small")
    assert [t.user_attrs["arm"] for t in trials[:3]] == [
        "plain PD",
        "uniform weights",
        name,
    ]
    model = launched.runs / "promote-small/model"
    assert exported(model)[0] == student(launched, trials[2])
    before = {path: path.stat().st_mtime_ns for path in sorted(model.rglob("*"))}
    again = launched.command("promote", "small", "--to", file, "--arm", "weights")
    assert again.status == 0
    assert again.err == "promote-small is complete; nothing is left to do\n"
    assert {path: path.stat().st_mtime_ns for path in sorted(model.rglob("*"))} == before
    # The same as a file that names the winner.
    arms = ["plain", "uniform", {"winner_of": "small"}]
    asked = launched.write({**PD, "plan": {"arms": arms, "seeds": [0, 1]}})
    assert "nothing is left to do" in launched.command("launch", asked).err
    launched.done("export", "promote-small", "early", "--nfe", "4", "--trial", "2")
    early = exported(launched.folder / "early")[1]["fid"]
    assert (early["nfe"], early["value"]) == (4, trials[2].user_attrs["fids"]["4"]["value"])
    launched.done("report", "promote-small", "--out", "rounds")
    assert (launched.folder / "rounds/fid.png").exists()
