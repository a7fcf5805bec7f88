"""One chain of a promotion, in this process: stopped, taken over, out of disk. No Ray."""

import errno
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from search.analysis.promotion import PLAIN_PD, given_arm, plan_progressive
from search.worker.chain_trial import ChainAssets, load_chain, prepare_chain, train_and_measure
from search.worker.workers import ChainWorker

import bdense.models.store
from bdense.errors import StoppedError
from bdense.models.store import denoiser_sha256, load_denoiser
from search.errors import DiskFullError, LeaseLostError, SpecChangedError
from search.storage.disk import is_full_disk
from search.storage.ledger import Claim, Ledger
from search.study.arms import SPACES, UNIFORM, Arm, Planned
from search.study.progress_text import share_done
from search.study.trial_log import LOG_FILE, TrialLog, read_log
from tests.measured import copy_storage, empty_storage, open_once
from tests.studies import promotion

CPU = torch.device("cpu")
OURS = given_arm("1.386,-4.274")
TINY = {
    "teacher__train__kimg": 0.128,
    "teacher__train__batch": 32,
    "round": {"updates": 5, "batch": 32, "lr": 3e-4},
    "evaluation__images": 64,
    "evaluation__batch": 32,
    "resources": {"gpus": 0, "checkpoint_seconds": 1e-9},
}


class InterruptedRunError(Exception):
    pass


@pytest.fixture(scope="module")
def assets(shared_cache) -> ChainAssets:
    """The chain 8 -> 4 -> 2 of the digits, five updates a round."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BDENSE_CACHE", str(shared_cache))
        spec = promotion(**TINY)
        prepare_chain(spec, CPU, lambda *_: None)
        return load_chain(spec, CPU)


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch, shared_cache) -> None:
    monkeypatch.setenv("BDENSE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("BDENSE_CACHE", str(shared_cache))


@dataclass
class Told:
    """What a chain said on its way."""

    fids: list[tuple[int, float]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    def run(
        self,
        assets: ChainAssets,
        folder: Path,
        arm: Arm = OURS,
        *,
        seed: int = 0,
        check: Callable[[], None] = lambda: None,
    ) -> dict[str, Any]:
        return train_and_measure(
            assets,
            arm,
            seed,
            folder,
            check=check,
            report=self.texts.append,
            on_fid=lambda steps, value: self.fids.append((steps, value)),
        )


def comparable(result: dict[str, Any]) -> dict[str, Any]:
    """A result without what tells where and how fast it was made."""
    attrs = {k: v for k, v in result["attrs"].items() if k not in ("timings", "student")}
    return result | {"attrs": attrs}


def hashes(folder: Path) -> list[str]:
    return [denoiser_sha256(load_denoiser(folder / f"{n:05d}.safetensors")[0]) for n in (4, 2)]


@pytest.fixture(scope="module")
def calm(assets, tmp_path_factory) -> tuple[Path, dict[str, Any], Told]:
    """The row that nothing happens to."""
    folder, told = tmp_path_factory.mktemp("runs") / "promote-digits/00002", Told()
    return folder, told.run(assets, folder), told


# ---- what a row is ----


def test_each_round_is_measured_after_the_teacher(assets, calm):
    _, result, told = calm
    attrs = result["attrs"]
    assert attrs["teacher_fid"] == assets.teacher_fid
    assert told.fids == [
        (8, assets.teacher_fid["value"]),
        *((n, attrs["fids"][str(n)]["value"]) for n in (4, 2)),
    ]
    assert [fid["nfe"] for fid in attrs["fids"].values()] == [4, 2]
    assert result["value"] == attrs["fid"]["value"] == attrs["fids"]["2"]["value"]
    assert (assets.teacher_fid["nfe"], assets.teacher_fid["seeds"]) == (8, {"evaluation": 0})
    assert attrs["fid"]["seeds"] == {"training": 0, "evaluation": 0}
    assert attrs["fid"]["images"] == 64
    assert (attrs["a"], attrs["b"], attrs["arm"]) == (1.386, -4.274, OURS.name)
    assert attrs["weights"] == pytest.approx([0.2, 0.8], rel=1e-3)
    assert attrs["student"] == "promote-digits/00002/00002.safetensors"
    assert attrs["timings"].keys() == {"student_seconds", "evaluation_seconds"}


def test_a_row_leaves_each_round_with_its_pictures_and_no_checkpoint(calm):
    folder, _, _ = calm
    assert sorted(path.name for path in folder.iterdir()) == [
        "00002-samples.png",
        "00002.fid.json",
        "00002.md",
        "00002.safetensors",
        "00004-samples.png",
        "00004.fid.json",
        "00004.md",
        "00004.safetensors",
        "result.json",
        "trial.json",
    ]


@pytest.mark.parametrize(
    ("arm", "method", "weights"),
    [(PLAIN_PD, "pd", [1.0]), (UNIFORM, "pd-uniform", [0.5, 0.5]), (OURS, "pd-bdense", None)],
)
def test_students_say_how_they_were_made(assets, calm, tmp_path, arm, method, weights):
    folder = calm[0]
    if arm != OURS:
        folder = tmp_path / "promote-digits/00000"
        attrs = Told().run(assets, folder, arm)["attrs"]
        assert (attrs["method"], attrs["weights"]) == (arm.params["method"], weights)
        assert not attrs.keys() & {"a", "b"}
    student, metadata = load_denoiser(folder / "00002.safetensors")
    assert (metadata["method"], metadata["params"]) == (method, arm.params)
    assert metadata["study"] == "promote-digits"
    assert metadata["seeds"] == {"training": 0, "evaluation": 0}
    assert student.num_branches == 1
    # The same network all along: the teacher's size.
    count = sum(p.numel() for p in assets.teacher.parameters())
    assert sum(p.numel() for p in student.parameters()) == count


def test_progress_counts_each_round_alike(calm):
    texts = calm[2].texts
    assert texts[0].startswith("round 1/2: training 1/5, loss ")
    assert texts[-1] == "round 2/2: evaluating 64/64 images"
    shares = [share_done(text) for text in texts]
    assert shares == sorted(shares)
    assert shares[0] == pytest.approx(0.9 / 5 / 2)
    assert shares[-1] == 1.0


def test_a_converting_round_is_measured_beside_the_teacher_not_in_its_place(assets, tmp_path):
    """Of a teacher that predicts v, students of epsilon: 8 -> 8 -> 4, then on."""
    spec = promotion(**TINY, prediction_type="epsilon", chain={"first": 8, "last": 4})
    told = Told()
    result = told.run(load_chain(spec, CPU), tmp_path / "promote-digits/00002")
    attrs = result["attrs"]
    assert attrs["teacher_fid"] == assets.teacher_fid
    assert list(attrs["fids"]) == ["8", "4"]
    assert attrs["fids"]["8"]["value"] != assets.teacher_fid["value"]
    assert attrs["fids"]["8"]["seeds"] == {"training": 0, "evaluation": 0}
    student = load_denoiser(tmp_path / "promote-digits/00002/00004.safetensors")[0]
    assert student.precond.prediction_type == "epsilon"


# ---- taken over ----


def stop_at(text: str, told: Told) -> Callable[[], None]:
    """A ``check`` that ends the work once so much was told."""

    def check() -> None:
        if any(each.startswith(text) for each in told.texts):
            raise InterruptedRunError

    return check


@pytest.mark.parametrize(
    "moment",
    [
        "round 1/2: training 3/5",
        "round 1/2: evaluating",
        "round 2/2: training 2/5",
        "round 2/2: evaluating",
    ],
)
def test_a_row_that_is_stopped_and_taken_over_gives_the_same_bit_for_bit(
    assets, calm, tmp_path, moment
):
    expected_folder, expected, all_told = calm
    folder, told = tmp_path / "promote-digits/00002", Told()
    with pytest.raises(InterruptedRunError):
        told.run(assets, folder, check=stop_at(moment, told))
    again = Told()
    result = again.run(assets, folder)
    assert comparable(result) == comparable(expected)
    assert hashes(folder) == hashes(expected_folder)
    assert again.fids == all_told.fids
    # Nothing that was saved is done again: at most the update that was stopped.
    trained = [text for text in (*told.texts, *again.texts) if "training" in text]
    assert 10 <= len(trained) <= 11


def test_a_stopped_row_saves_just_there_and_its_log_tells_of_every_update(assets, calm, tmp_path):
    """With checkpoints too rare to help: nothing is done twice."""
    expected_folder, expected, _ = calm
    rare = assets.spec.resources.model_copy(update={"checkpoint_seconds": 1e6})
    assets = replace(assets, spec=assets.spec.model_copy(update={"resources": rare}))
    folder, told = tmp_path / "promote-digits/00002", Told()

    def check() -> None:
        if any(each.startswith("round 2/2: training 3/5") for each in told.texts):
            raise StoppedError("enough")

    quiet = {"report": told.texts.append, "on_fid": lambda *_: None}
    with pytest.raises(StoppedError):
        train_and_measure(assets, OURS, 0, folder, check=check, log=TrialLog(folder), **quiet)
    calmly = {"check": lambda: None, "log": TrialLog(folder)}
    result = train_and_measure(assets, OURS, 0, folder, **calmly, **quiet)
    assert comparable(result) == comparable(expected)
    assert hashes(folder) == hashes(expected_folder)
    events, _ = read_log(folder / LOG_FILE)
    assert [(e["event"], e["steps"], e.get("iteration")) for e in events] == [
        *(("training", 4, i) for i in range(1, 6)),
        ("checkpoint", 4, 5),
        ("evaluating", 4, None),
        ("round", 4, None),
        *(("training", 2, i) for i in range(1, 4)),
        ("checkpoint", 2, 3),
        *(("training", 2, i) for i in (4, 5)),
        ("checkpoint", 2, 5),
        ("evaluating", 2, None),
        ("round", 2, None),
    ]
    assert events[0]["weights"] == [pytest.approx([0.2, 0.8], rel=1e-3)]
    assert len(events[0]["branch_losses"][0]) == 2
    assert events[-1]["fid"] == result["value"]


def test_a_result_that_is_there_is_only_told(assets, calm, tmp_path):
    folder, result, _ = calm

    def check() -> None:
        raise InterruptedRunError

    told = Told()
    assert told.run(assets, folder, check=check) == json.loads(json.dumps(result))
    assert (told.texts, told.fids) == ([], [])


def test_another_row_s_folder_is_moved_aside(assets, tmp_path):
    """Its rounds are of other weights: a study of the same name in a deleted database."""
    folder = tmp_path / "promote-digits/00002"
    told = Told()
    with pytest.raises(InterruptedRunError):
        told.run(assets, folder, UNIFORM, check=stop_at("round 2/2", told))
    again = Told()
    with pytest.raises(InterruptedRunError):
        again.run(assets, folder, OURS, check=stop_at("round 1/2: training 1/5", again))
    (aside,) = folder.parent.glob("00002.*")
    assert (aside / "00004.safetensors").exists()
    assert not (folder / "00004.safetensors").exists()


# ---- the teacher's own FID ----


def test_the_teacher_s_fid_is_measured_once(assets, monkeypatch, shared_cache):
    def measured(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    files = sorted((shared_cache / "teacher-fids").glob("*.json"))
    monkeypatch.setattr("search.worker.evaluation.draw_images", measured)
    assert load_chain(assets.spec, CPU).teacher_fid == assets.teacher_fid
    # Seeds of training and the number of rounds are none of its conditions.
    longer = promotion(**TINY, seeds={"training": [5]}, chain={"first": 8, "last": 4})
    assert load_chain(longer, CPU).teacher_fid == assets.teacher_fid
    assert sorted((shared_cache / "teacher-fids").glob("*.json")) == files
    for other in ({"seeds": {"evaluation": 1}}, {"chain": {"first": 4, "last": 2}}):
        with pytest.raises(AssertionError, match="measured again"):
            load_chain(promotion(**TINY, **other), CPU)


def test_its_measurement_is_shown(monkeypatch, tmp_path, shared_cache):
    cache = tmp_path / "cache"
    cache.mkdir()
    for path in shared_cache.iterdir():
        if path.name != "teacher-fids":
            (cache / path.name).symlink_to(path)
    monkeypatch.setenv("BDENSE_CACHE", str(cache))
    shown = []
    prepare_chain(promotion(**TINY), CPU, lambda *told: shown.append(told))
    assert [told for told in shown if told[0] == "teacher FID"] == [
        ("teacher FID", done, 64, "at 8 steps") for done in (32, 64)
    ]


# ---- through the ledger ----


@pytest.fixture
def planned(assets, tmp_path, tmp_path_factory, monkeypatch) -> Planned:
    open_once(monkeypatch)
    url = copy_storage(empty_storage(tmp_path_factory.getbasetemp()), tmp_path / "study.db")
    return plan_progressive(url, assets.spec, OURS, of=None, seeds=[0])


@pytest.fixture
def worker(planned, assets, monkeypatch) -> ChainWorker:
    monkeypatch.setattr("search.worker.workers.load_chain", lambda *_: assets)
    return ChainWorker(planned)


def skip_to(planned: Planned, arm: int) -> None:
    """Fail the rows before."""
    for _ in range(arm):
        claim = planned.ledger.claim(SPACES["progressive"], None)
        planned.ledger.fail(claim, "error", "left out", {})


def test_values_on_the_way_are_the_fids_by_steps(planned, worker, calm):
    skip_to(planned, 2)
    worker.work(worker.claim())
    trial = planned.ledger.study.trials[2]
    assert trial.params == {"arm": 2, "seed": 0}
    assert trial.intermediate_values == dict(calm[2].fids)
    assert sorted(trial.intermediate_values) == [2, 4, 8]
    assert trial.value == calm[1]["value"]
    assert trial.user_attrs["tries"] == 1
    assert trial.user_attrs["fids"] == calm[1]["attrs"]["fids"]
    assert worker.claim() is None


def test_a_worker_whose_row_was_taken_over_tells_nothing(planned, worker, monkeypatch):
    skip_to(planned, 2)
    claimed = worker.claim()
    planned.ledger.release(claimed.claim)
    other = planned.ledger.claim(SPACES["progressive"], None)
    assert isinstance(other, Claim)
    with pytest.raises(LeaseLostError):
        worker.work(claimed)
    trial = planned.ledger.study.trials[2]
    assert (trial.value, trial.intermediate_values) == (None, {})


def test_a_worker_of_other_conditions_gives_its_row_back(planned, worker):
    claimed = worker.claim()
    planned.ledger.study.set_user_attr("fingerprint", "0" * 16)
    with pytest.raises(SpecChangedError, match=r"than study promote-digits has \(0{16}\)"):
        worker.work(claimed)
    again = planned.ledger.claim(SPACES["progressive"], None)
    assert (again.number, again.attempt, again.tries) == (0, 2, 1)


# ---- no space left ----


def test_what_a_full_disk_is():
    assert is_full_disk(OSError(errno.ENOSPC, "No space left on device"))
    assert is_full_disk(OSError(errno.EDQUOT, "Disk quota exceeded"))
    assert not is_full_disk(OSError(errno.EACCES, "Permission denied"))
    assert not is_full_disk(ValueError("os error 28"))


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        # Which says so in words alone.
        SafetensorError("Error while serializing: I/O error: No space left (os error 28)"),
    ],
)
def test_a_full_disk_ends_the_launch_and_not_the_row(
    planned, worker, calm, tmp_path, monkeypatch, error
):
    """The row is given back and forgiven, and goes on after the round that was saved."""
    skip_to(planned, 2)
    save = bdense.models.store.save_file

    def full(tensors: dict, path: Path, **rest: object) -> None:
        if Path(path).name.startswith(".00002.safetensors"):
            raise error
        save(tensors, path, **rest)

    monkeypatch.setattr(bdense.models.store, "save_file", full)
    with pytest.raises(DiskFullError) as found:
        worker.work(worker.claim())
    assert str(found.value).startswith("no space is left where runs are kept (")
    assert "give the same command again: it carries on from what was saved last" in str(
        found.value
    )
    folder = tmp_path / "runs/promote-digits/00002"
    assert (folder / "00004.safetensors").exists()
    assert (folder / "00004.fid.json").exists()
    assert not (folder / "00002.safetensors").exists()
    counts = Ledger.open(planned.url, planned.name, budget=None).counts()
    assert (counts.running, counts.failed) == (1, 2)

    monkeypatch.setattr(bdense.models.store, "save_file", save)
    claimed = worker.claim()
    assert (claimed.claim.number, claimed.claim.attempt, claimed.claim.tries) == (2, 2, 1)
    worker.work(claimed)
    trial = planned.ledger.study.trials[2]
    assert trial.value == calm[1]["value"]
    assert trial.user_attrs["fids"] == calm[1]["attrs"]["fids"]
    assert hashes(folder) == hashes(calm[0])
