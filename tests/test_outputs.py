"""What --out names is never lost: by another kind of file, other settings, or an interrupt."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bdense.errors import InputError
from bdense.files import atomic_write, require_output
from bdense.models.store import denoiser_sha256, load_denoiser, load_tensors, save_denoiser
from tests.commands import DIGITS, SHORT, TINY, bdense, done, refused
from tests.small import small_teacher

TEXT = "a novel"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path]:
    """A teacher and its student."""
    folder = tmp_path_factory.mktemp("outputs")
    teacher, student = folder / "teacher.safetensors", folder / "student.safetensors"
    done("teacher", *TINY, "--out", teacher)
    done("distill", teacher, *SHORT, "--a", 1, "--out", student)
    return teacher, student


def commands(teacher: Path, student: Path) -> dict[str, tuple[object, ...]]:
    return {
        "teacher": ("teacher", *TINY),
        "distill": ("distill", teacher, *SHORT, "--a", 1),
        "sample": ("sample", student, "--images", 2),
        "reference": ("reference", "--data", "digits", *DIGITS),
        "convert": ("convert", teacher),
    }


@pytest.mark.parametrize("verb", ["teacher", "distill", "sample", "reference", "convert"])
def test_a_file_of_another_kind_is_not_replaced(made, tmp_path, verb):
    command, out = commands(*made)[verb], tmp_path / "x.safetensors"
    if verb == "reference":
        command = (*command, "--cache", tmp_path / "cache")
    out.write_text(TEXT)
    assert f"{out} " in refused(bdense(*command, "--out", out))
    assert out.read_text() == TEXT
    for there in (tmp_path / "link.safetensors", tmp_path / "pipe.safetensors"):
        if "link" in there.name:
            there.symlink_to(out)
        else:
            os.mkfifo(there)
        for force in ((), ("--force",)):
            assert f"{there} is a " in refused(bdense(*command, *force, "--out", there))
    assert (tmp_path / "link.safetensors").is_symlink()
    assert out.read_text() == TEXT
    if verb in ("sample", "convert"):
        done(*command, "--force", "--out", out)
        assert out.read_bytes() != TEXT.encode()


@pytest.mark.parametrize("verb", ["teacher", "distill", "convert"])
def test_what_lies_beside_weights_is_not_replaced(made, tmp_path, verb):
    """A card, and facts for people, have the name of the weights."""
    for ending in (".md", ".json") if verb == "convert" else (".md",):
        beside = tmp_path / f"notes{ending}"
        beside.write_text(TEXT)
        line = refused(bdense(*commands(*made)[verb], "--out", tmp_path / "notes.safetensors"))
        assert f"{beside} " in line
        assert beside.read_text() == TEXT
        assert [path.name for path in tmp_path.iterdir()] == [beside.name]
        beside.unlink()


@pytest.mark.parametrize("ending", [".fid.json", ".epd.json"])
def test_what_a_student_is_measured_or_drawn_with_is_not_replaced(made, tmp_path, ending):
    """Before it is trained."""
    beside = tmp_path / f"student{ending}"
    beside.write_text("[1]")
    small = ("--method", "epd", "--steps", 2, "--kimg", 0.064, "--batch", 32, *DIGITS)
    out = ("--cache", tmp_path / "cache", "--out", tmp_path / "student.safetensors")
    line = refused(bdense("distill", made[0], *small, *out))
    assert f"{beside} " in line
    assert beside.read_text() == "[1]"
    assert [path.name for path in tmp_path.iterdir()] == [beside.name]


@pytest.mark.parametrize("verb", ["distill", "convert"])
def test_an_input_is_not_replaced(made, verb):
    teacher, _ = made
    before = teacher.read_bytes()
    assert f"{teacher} is" in refused(bdense(*commands(*made)[verb], "--out", teacher))
    assert teacher.read_bytes() == before


def test_a_finished_model_of_other_settings_is_not_replaced(made, tmp_path):
    teacher, student = made
    for path, command, other in (
        (teacher, commands(*made)["teacher"], ("--lr", 1e-3)),
        (student, commands(*made)["distill"], ("--a", 2)),
    ):
        before = path.read_bytes()
        answer = bdense(*command, "--out", path)  # the same: nothing is trained
        assert (answer.status, answer.err, path.read_bytes()) == (0, "", before)
        assert "differs in: " in refused(bdense(*command, *other, "--out", path))
        assert path.read_bytes() == before
        again = tmp_path / path.name
        again.write_bytes(before)
        done(*command, *other, "--force", "--out", again)
        assert denoiser_sha256(load_denoiser(again)[0]) != denoiser_sha256(load_denoiser(path)[0])


def test_converting_twice_is_fine_and_another_model_is_refused(made, tmp_path):
    teacher, student = made
    out = tmp_path / "x.safetensors"
    assert done("convert", teacher, "--out", out) == done("convert", teacher, "--out", out)
    assert "differs in: model" in refused(bdense("convert", student, "--out", out))


def test_statistics_of_another_set_are_not_replaced(tmp_path, shared_cache):
    out, made = tmp_path / "x.npz", ("reference", *DIGITS, "--cache", shared_cache)
    done(*made, "--data", "digits", "--out", out)
    done(*made, "--data", "digits", "--out", out)
    line = refused(bdense(*made, "--data", "digits@16", "--out", out))
    assert f"{out} holds the statistics of another data set" in line


def test_a_model_in_a_folder_is_an_input_too(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    save_denoiser(model / "model.safetensors", small_teacher(), {"kind": "teacher"})
    line = refused(bdense("convert", model, "--out", model / "model.safetensors"))
    assert "is read by this command" in line


def test_a_device_is_not_replaced(tmp_path):
    for path in (Path("/dev/full"), Path("/dev/stdout")):
        with pytest.raises(InputError, match=f"{path} is a "), atomic_write(path):
            raise AssertionError("it was opened")
        with pytest.raises(InputError, match=f"{path} is a "):
            require_output(path, force=True)


@pytest.mark.parametrize("buffered", ["", "1"])
@pytest.mark.parametrize("package", ["bdense", "search"])
def test_a_full_standard_output_is_named(package, buffered):
    """Also where Python keeps the text until its end."""
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", package, "--version"],
            env=os.environ | {"PYTHONUNBUFFERED": buffered},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    name = {"search": "bdense-search"}.get(package, package)
    assert ended.returncode == 2
    assert ended.stderr == f"{name}: standard output: {os.strerror(errno.ENOSPC)}\n"


def test_an_interrupted_training_is_saved(tmp_path):
    """Long before a save is due."""
    out = tmp_path / "teacher.safetensors"
    options = ("teacher", *TINY, "--kimg", 1000, "--out", out)
    command = [sys.executable, "-m", "bdense", *map(str, options)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        done_first = int(process.stderr.readline().partition("/")[0])  # 2 s after the start
        process.send_signal(signal.SIGTERM)  # which Ctrl-C shares its handler with
        err = process.stderr.read()
    saved = tmp_path / "teacher.training.safetensors"
    assert process.returncode == 130, err
    assert f"saved in {saved}; " in err.splitlines()[-1]
    assert "Traceback" not in err
    assert saved.exists()
    assert not out.exists()
    assert load_tensors(saved)[1]["iteration"] >= done_first


def test_a_training_that_is_ended_at_once_says_what_is_saved(tmp_path, monkeypatch):
    """A second Ctrl-C, or one before the first iteration: as there is a checkpoint, or none."""
    out = tmp_path / "teacher.safetensors"
    saved = out.with_suffix(".training.safetensors")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("bdense.verbs.teacher.train_teacher", interrupted)
    answer = bdense("teacher", *TINY, "--kimg", 1, "--out", out)
    assert (answer.status, str(saved) in answer.err) == (130, False)
    saved.touch()
    answer = bdense("teacher", *TINY, "--kimg", 1, "--out", out)
    assert (answer.status, f"saved in {saved}; " in answer.err) == (130, True)
