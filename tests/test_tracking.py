"""Trackers: told what a run does, without a part in it."""

import json
import sys

import pytest

from bdense.errors import InputError, NonFiniteLossError
from bdense.models.store import denoiser_sha256, load_denoiser
from bdense.training.tracking import Tracking
from search.errors import SpecError
from tests.commands import DIGITS, SHORT, TINY, bdense, done, refused
from tests.plugins import line_tracker
from tests.studies import spec

__all__ = ["line_tracker"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    path = tmp_path_factory.mktemp("tracking") / "teacher.safetensors"
    done("teacher", *TINY, "--out", path)
    return path


def distilled(teacher, out, *options):
    """Hash of a student made anew."""
    done("distill", teacher, *SHORT, *options, "--out", out)
    return denoiser_sha256(load_denoiser(out)[0])


def events(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_tracker_of_another_package_is_told_all_and_changes_nothing(
    line_tracker, teacher, shared_cache, tmp_path
):
    plain = distilled(teacher, tmp_path / "plain.safetensors")
    measured = (*DIGITS, "--images", 64, "--cache", shared_cache)
    log = ("--log", f"lines:{tmp_path / 'a'}", "--log", f"lines:{tmp_path / 'b'}")
    assert distilled(teacher, tmp_path / "s.safetensors", *measured, *log) == plain
    start, *updates, evaluation, end = events(tmp_path / "a")
    assert (start[:2], start[2]["kimg"], end) == (["start", "s"], 0.064, ["end", False])
    assert [update[:3] for update in updates] == [["update", "", 1], ["update", "", 2]]
    assert {"loss", "lr", "gradient_norm", "branch_loss/4", "weight/1"} <= updates[0][3].keys()
    fid = load_denoiser(tmp_path / "s.safetensors")[1]["fid"]["value"]
    assert evaluation == ["evaluation", "", 2, {"fid": fid}]
    assert events(tmp_path / "b") == events(tmp_path / "a")


def test_a_teacher_is_tracked_too(line_tracker, tmp_path):
    log = ("--log", f"lines:{tmp_path / 'a'}")
    done("teacher", *TINY, *log, "--out", tmp_path / "t.safetensors")
    assert [each[0] for each in events(tmp_path / "a")] == ["start", *["update"] * 4, "end"]


def test_one_that_fails_is_left_out_and_the_training_goes_on(line_tracker, teacher, tmp_path):
    log = ("--log", f"lines:{tmp_path / 'fails'}", "--log", f"lines:{tmp_path / 'a'}")
    answer = bdense("distill", teacher, *SHORT, *log, "--out", tmp_path / "s.safetensors")
    assert answer.status == 0
    assert answer.err.count("disk is full") == 1
    assert [each[0] for each in events(tmp_path / "fails")] == ["start"]
    assert [each[0] for each in events(tmp_path / "a")] == ["start", "update", "update", "end"]


def test_a_run_that_ends_with_an_error_says_so(line_tracker, tmp_path):
    with (
        pytest.raises(NonFiniteLossError),
        Tracking((f"lines:{tmp_path / 'a'}",), "run", {}),
    ):
        raise NonFiniteLossError("loss", iteration=3)
    assert events(tmp_path / "a")[-1] == ["end", True]


def test_runs_that_were_opened_are_closed_where_another_cannot_start(line_tracker, tmp_path):
    with pytest.raises(InputError):
        Tracking((f"lines:{tmp_path / 'a'}", "tensorboard"), "run", {})
    assert events(tmp_path / "a")[1:] == [["end", True]]


def test_a_long_stage_has_about_a_thousand_points_and_its_end(line_tracker, tmp_path):
    with Tracking((f"lines:{tmp_path / 'a'}",), "run", {}) as tracking:
        for done in range(1, 2502):
            tracking.update("8", done, 2501, {"loss": 1.0})
    at = [each[2] for each in events(tmp_path / "a") if each[0] == "update"]
    assert (len(at), at[0], at[-2:]) == (1251, 2, [2500, 2501])


@pytest.mark.parametrize(
    ("log", "names"),
    [("mine:x", "mine"), ("tensorboard", "tensorboard:DIR"), ("lines:/no/such/x", "/no/such/x")],
)
def test_a_tracker_that_cannot_start_is_refused_first(line_tracker, teacher, tmp_path, log, names):
    out = tmp_path / "s.safetensors"
    line = refused(bdense("distill", teacher, *SHORT, "--log", log, "--out", out))
    assert line.startswith("--log ")
    assert names in line
    assert not out.exists()


def test_a_package_that_is_missing_is_named(teacher, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)  # so that it cannot be imported
    out = tmp_path / "s.safetensors"
    line = refused(bdense("distill", teacher, *SHORT, "--log", "mlflow", "--out", out))
    assert "pip install 'bdense[mlflow]'" in line


# ---- for real ----


def test_tensorboard_has_the_curves(teacher, tmp_path):
    pytest.importorskip("tensorboard", reason="needs the tensorboard extra")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    distilled(teacher, tmp_path / "s.safetensors", "--log", f"tensorboard:{tmp_path / 'tb'}")
    found = EventAccumulator(str(tmp_path / "tb" / "s")).Reload()
    assert [point.step for point in found.Scalars("loss")] == [1, 2]
    assert "settings/text_summary" in found.Tags()["tensors"]


def test_wandb_has_the_curves_offline(teacher, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs the wandb extra")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    distilled(teacher, tmp_path / "s.safetensors", "--log", "wandb:bdense-tests")
    (kept,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    content = kept.read_bytes()
    assert all(name in content for name in (b"gradient_norm", b"branch_loss/4", b"kimg"))


def test_mlflow_has_the_curves(teacher, tmp_path):
    pytest.importorskip("mlflow", reason="needs the mlflow extra")
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    distilled(teacher, tmp_path / "s.safetensors", "--log", f"mlflow:{uri}")
    client = MlflowClient(tracking_uri=uri)
    of = client.get_experiment_by_name("bdense").experiment_id
    (run,) = client.search_runs([of])
    assert (run.info.run_name, run.info.status, run.data.params["nfe"]) == ("s", "FINISHED", "2")
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [point.step for point in history] == [1, 2]


def test_a_study_says_before_it_starts_that_a_trackers_package_is_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        SpecError, match=r"resources\.log: tensorboard:\S+ .*bdense\[tensorboard\]"
    ):
        spec(resources={"log": ["tensorboard:x"]})


def test_a_folder_is_no_url_whatever_its_name():
    place = "tensorboard:/runs/lowpass=2"
    assert spec(resources={"log": [place]}).resources.log == (place,)
