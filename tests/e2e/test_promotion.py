"""What a search found, at work, from a user's seat: real Ray, real torch, tiny digits."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from bdense.models.store import denoiser_sha256, load_denoiser
from search.report.dashboard import dashboard_application
from search.storage.engine import open_storage
from search.storage.ledger import Ledger
from tests.commands import bdense
from tests.e2e.study import Workplace, kill, small_study, wait_until
from tests.measured import VALLEY, search
from tests.test_dashboard import ask

# Ten minutes on two busy cores; chains and rows also run in test_chain_trial.py, without Ray.

PAPER = "1.386,-4.274"
NETWORK = {"model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": []}
TEACHER = {"network": NETWORK, "kimg": 0.256, "batch": 64, "ema_halflife_kimg": 0.1}
# Three trials of ten updates; a chain 8 -> 4 -> 2 of five updates a round.
STUDY: dict[str, Any] = {
    "teacher": {"train": TEACHER},
    "budget": {"trials": 3, "kimg": 0.64},
    "evaluation": {"images": 64},
}
PROMOTION: dict[str, Any] = {
    "name": "promote-small",
    "data": "digits",
    "teacher": {"train": {**TEACHER, "precond": {"name": "cosine"}}},
    "chain": {"first": 8, "last": 2},
    "round": {"updates": 5, "batch": 32, "lr": 3e-4},
    "evaluation": {"images": 64, "extractor": "digits-classifier"},
    "seeds": {"training": [0, 1]},
    "resources": {"checkpoint_seconds": 0.2, "lease_seconds": 10},
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def workplace(tmp_path, cache) -> Workplace:
    return Workplace(tmp_path, cache)


def done(workplace: Workplace, *arguments: str | Path) -> str:
    """What a command printed that succeeds."""
    answer = workplace.run(*arguments, timeout=400)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def refused(workplace: Workplace, *arguments: str | Path) -> str:
    """The one line of a mistake."""
    answer = workplace.run(*arguments, timeout=120)
    assert (answer.returncode, answer.stdout) == (2, ""), answer.stderr
    (line,) = answer.stderr.splitlines()
    return line.removeprefix("bdense-search: ")


def url(workplace: Workplace) -> str:
    return f"sqlite:///{workplace.folder}/runs/bdense.db"


def ledger(workplace: Workplace, name: str) -> Ledger:
    return Ledger.open(url(workplace), name, budget=None)


def rows(workplace: Workplace, name: str) -> list[Any]:
    """Complete rows, and no others."""
    trials = ledger(workplace, name).study.get_trials(deepcopy=False)
    assert {trial.state.name for trial in trials} == {"COMPLETE"}
    return trials


def write(workplace: Workplace, name: str, **sections: Any) -> Path:
    """A promotion's file."""
    path = workplace.folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**PROMOTION, "name": name, **sections}))
    return path


def drawn(workplace: Workplace, model: Path) -> tuple[int, int]:
    """Size of the picture that ``bdense sample`` makes of a folder."""
    path = workplace.folder / "drawn.png"
    answer = bdense("sample", model, "--out", path)
    assert answer.status == 0, answer.err
    with Image.open(path) as picture:
        return picture.size


# ---- a chain of given weights ----


def test_weights_are_promoted_to_a_model_folder(workplace):
    """No search is needed for weights that are given."""
    file = write(workplace, "promote-small", seeds={"training": [0]})
    out = done(workplace, "promote", file, "--weights", PAPER, "--workers", "1")
    said, headline, *_ = out.splitlines()
    assert said == (
        "log w_k = 1.386 k - 4.274: w_2/w_1 = 3.999 at K = 2; rescaled to sum 1: 0.2 0.8"
    )
    assert headline == "promote-small: 3 of 3 rows complete, 0 pruned, 0 failed, 0 running"
    plain, uniform, ours = rows(workplace, "promote-small")
    for trial in (plain, uniform, ours):
        fids = trial.user_attrs["fids"]
        teacher = trial.user_attrs["teacher_fid"]["value"]
        assert trial.intermediate_values == {
            8: teacher,
            4: fids["4"]["value"],
            2: fids["2"]["value"],
        }
        assert trial.value == fids["2"]["value"]
    # The first two rounds' students differ by nothing but their weights.
    assert len({trial.value for trial in (plain, uniform, ours)}) == 3
    assert ours.user_attrs["weights"] == pytest.approx([0.2, 0.8], rel=1e-3)

    model = workplace.folder / "runs/promote-small/model"
    assert f"model folder: {model.relative_to(workplace.folder)}\n" in out
    student, metadata = load_denoiser(model / "model.safetensors")
    kept = workplace.folder / "runs" / ours.user_attrs["student"]
    assert denoiser_sha256(student) == denoiser_sha256(load_denoiser(kept)[0])
    assert metadata["fid"] == ours.user_attrs["fid"]
    assert drawn(workplace, model)[0] >= 64


# ---- from a search on ----


@pytest.fixture(scope="module")
def launched(tmp_path_factory, cache) -> Workplace:
    """A search of three trials, and its confirmation: two candidates, three seeds."""
    workplace = Workplace(tmp_path_factory.mktemp("launched"), cache)
    study = workplace.write(small_study(**STUDY))
    assert "3 of 3 trials complete" in done(workplace, "launch", study)
    assert "only a best of n" in refused(
        workplace, "promote", "small", "--to", write(workplace, "promote-small")
    )
    out = done(workplace, "confirm", "small", "--candidates", "2", "--seeds", "3")
    assert out.startswith("small.confirm: 12 of 12 rows complete, 0 pruned, 0 failed, 0 running")
    return workplace


@pytest.mark.slow
def test_the_best_is_confirmed(launched):
    found = launched.json("best", "small")["confirmed"]
    assert (found["ended"], found["kimg"]) == (True, 0.64)
    assert found["winner"]["trial"] in {arm["trial"] for arm in found["arms"][2:]}
    assert [sorted(arm["fids"]) for arm in found["arms"]] == [["1", "2", "3"]] * 4
    assert f"confirmed at 0.64 kimg: {found['winner']['name']}" in done(launched, "best", "small")
    # Fresh seeds: other students than the search's, and other latents.
    for trial in rows(launched, "small.confirm"):
        seed = trial.params["seed"]
        assert trial.user_attrs["fid"]["seeds"] == {"training": seed, "evaluation": seed}
        assert trial.value not in [each.value for each in rows(launched, "small")]
    again = launched.run("confirm", "small", "--candidates", "2", "--seeds", "3", timeout=120)
    assert again.stderr == "small.confirm is complete; nothing is left to do\n"


@pytest.mark.slow
def test_a_confirmation_goes_by_its_own_name(launched):
    status = launched.json("status", "small.confirm")
    assert status["trials"]["complete"] == 12
    page = launched.folder / "shown/report.md"
    assert done(launched, "report", "small.confirm", "--out", "shown") == (
        "shown/report.html\nshown/report.md\n"
    )
    assert page.read_text().count("![") == 5  # the plot, and a grid of each arm
    winner = launched.json("best", "small")["confirmed"]["winner"]["name"]
    for name, folder in (("small.confirm", "of-rows"), ("small", "of-search")):
        done(launched, "export", name, folder)
        config = json.loads((launched.folder / folder / "config.json").read_text())
        assert winner in json.dumps(config)
    row = next(t for t in rows(launched, "small.confirm") if t.user_attrs["arm"] == winner)
    kept = load_denoiser(launched.folder / "runs" / row.user_attrs["student"])[0]
    exported = load_denoiser(launched.folder / "of-search/model.safetensors")[0]
    assert denoiser_sha256(exported) == denoiser_sha256(kept)
    assert drawn(launched, launched.folder / "of-search")[0] >= 64
    freed = [done(launched, "clean", "small.confirm") for _ in range(2)]
    assert float(freed[0].split()[0]) > 0
    assert freed[1] == "0.0 MiB of trajectories deleted\n"


@pytest.mark.slow
def test_a_confirmed_winner_is_promoted_by_a_chain(launched):
    file = write(launched, "promote-small", study="small")
    out = done(launched, "promote", file)
    assert "promote-small: 6 of 6 rows complete, 0 pruned, 0 failed, 0 running" in out
    winner = launched.json("best", "small")["confirmed"]["winner"]
    trials = rows(launched, "promote-small")
    assert {t.user_attrs["arm"] for t in trials} == {"plain PD", "uniform weights", winner["name"]}
    assert "at the search's K = 4 becomes w_2/w_1 = " in out
    # As the dashboard shows it: the FID over the steps, of every row.
    storage = open_storage(url(launched))
    key = next(s._study_id for s in storage.get_all_studies() if s.study_name == "promote-small")
    application = dashboard_application(storage, writable=False)
    status, shown = ask(application, "GET", f"/api/studies/{key}")
    assert status == 200
    for trial in shown["trials"]:
        assert [point["step"] for point in trial["intermediate_values"]] == [2, 4, 8]
    teachers = {trial.intermediate_values[8] for trial in trials}
    assert len(teachers) == 1

    model = launched.folder / "runs/promote-small/model"
    assert drawn(launched, model)[0] >= 64
    before = {path: path.stat().st_mtime_ns for path in sorted(model.rglob("*"))}
    again = launched.run("promote", file, timeout=120)
    assert again.returncode == 0
    assert again.stderr == "promote-small is complete; nothing is left to do\n"
    assert {path: path.stat().st_mtime_ns for path in sorted(model.rglob("*"))} == before
    assert [t.value for t in rows(launched, "promote-small")] == [t.value for t in trials]

    done(launched, "export", "promote-small", "early", "--steps", "4")
    early = load_denoiser(launched.folder / "early/model.safetensors")[1]
    assert (early["fid"]["nfe"], early["fid"]["value"]) == (4, trials[2].intermediate_values[4])
    assert done(launched, "report", "promote-small", "--out", "chain") == (
        "chain/report.html\nchain/report.md\n"
    )
    assert (launched.folder / "chain/fid.png").exists()
    other = refused(launched, "promote", file, "--weights", PAPER)
    assert "'promote-small' exists under other conditions" in other
    assert "a: " in other


@pytest.mark.slow
def test_a_confirmed_winner_is_trained_again(launched):
    options = ("--method", "sfd", "--nfe", "2,3", "--seeds", "1", "--kimg", "1.28")
    out = done(launched, "promote", "small", *options)
    assert "small.promote: 6 of 6 rows complete" in out
    for nfe in (2, 3):
        model = launched.folder / f"runs/small.promote/model-nfe{nfe}-1.28kimg"
        _, metadata = load_denoiser(model / "model.safetensors")
        assert metadata["fid"]["nfe"] == nfe
        assert {row["kimg"] for row in metadata["fid_table"]} == {1.28}


@pytest.mark.slow
def test_the_best_weights_are_measured_under_another_study_s_conditions(launched):
    other = small_study(**STUDY, student={"nfe": 3, "substeps": 2})
    other["name"] = "other"
    path = launched.write(other)
    out = done(launched, "transfer", "small", "--to", path, "--top", "1", "--seeds", "2")
    assert out.startswith("other.from.small: 6 of 6 rows complete, 0 pruned, 0 failed, 0 running")
    assert "64 images at NFE 3" in out
    trials = rows(launched, "other.from.small")
    assert [len(t.user_attrs["weights"]) for t in trials] == [1, 2, 2] * 2
    best = next(arm for arm in launched.json("best", "small")["confirmed"]["arms"][2:])
    assert trials[2].user_attrs["a"] == best["params"]["a"]


# ---- faults ----


@pytest.mark.faults
@pytest.mark.slow
def test_a_chain_whose_worker_is_killed_ends_with_the_same_bit_for_bit(workplace):
    """Once in the first round, once in the second: what was done is not done again."""
    sections = {
        "seeds": {"training": [0]},
        "round": {"updates": 100, "batch": 32, "lr": 3e-4},
    }
    calm, fault = (write(workplace, name, **sections) for name in ("calm", "fault"))
    options = ("--weights", PAPER, "--workers", "1")
    done(workplace, "promote", calm, *options)

    def worker_at(text: str, row: int) -> int | None:
        try:
            running = ledger(workplace, "fault").running()
        except ValueError:
            return None
        for each in running:
            if each.number == row and each.progress.startswith(text):
                return int(each.owner.rsplit(":", 1)[1])
        return None

    launcher = workplace.start("promote", fault, *options)
    try:
        # Long, for machines that do much else.
        first = wait_until(lambda: worker_at("round 1/2: training", 0), seconds=300, what="row 0")
        kill(first)
        second = wait_until(lambda: worker_at("round 2/2: training", 2), seconds=300, what="row 2")
        kill(second)
        folder = workplace.folder / "runs/fault/00002"
        first_round = (folder / "00004.safetensors").stat().st_mtime_ns
        _, err = launcher.communicate(timeout=300)
    finally:
        launcher.send_signal(signal.SIGINT)
    assert launcher.returncode == 0, err
    assert (folder / "00004.safetensors").stat().st_mtime_ns == first_round

    expected, found = rows(workplace, "calm"), rows(workplace, "fault")
    assert [trial.user_attrs["tries"] for trial in found] == [2, 1, 2]
    for one, other in zip(expected, found, strict=True):
        assert one.user_attrs["fids"] == other.user_attrs["fids"]
        assert one.intermediate_values == other.intermediate_values
        students = [
            denoiser_sha256(load_denoiser(workplace.folder / "runs" / t.user_attrs["student"])[0])
            for t in (one, other)
        ]
        assert students[0] == students[1]


# ---- mistakes ----


@pytest.mark.slow
def test_mistakes_are_one_line_each_and_exit_with_2(workplace, monkeypatch):
    """The real command, on a search whose FIDs are made up; more in test_promotion.py."""
    monkeypatch.setenv("BDENSE_RUNS", str(workplace.folder / "runs"))
    search(url(workplace), VALLEY)
    file = write(workplace, "promote-small")
    assert refused(workplace, "promote", "digits", "--to", file, "--weights", "nonsense") == (
        "--weights nonsense is no A,B of log w_k = a k + b; give two numbers, as in --weights "
        "1.386,-4.274"
    )
    assert "no study 'nobody'" in refused(workplace, "confirm", "nobody")
