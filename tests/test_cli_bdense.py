"""``bdense`` from a teacher to a FID, through its own command line; and the mistakes one makes."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bdense.command import run_verb
from bdense.data.datasets import load_dataset
from bdense.diffusion.sampling import Sampler, draw_images, sampler_from
from bdense.diffusion.solvers import make_solver
from bdense.metrics.extractors import load_extractor
from bdense.metrics.metrics import MetricSettings, measure_images
from bdense.metrics.references import dataset_reference
from bdense.models.store import denoiser_sha256, load_denoiser, save_denoiser
from bdense.verbs.common import Progress
from tests.commands import DIGITS, SHORT, TINY, bdense, distill, done, drawn, refused
from tests.small import small_teacher


@pytest.fixture(scope="module")
def folder(tmp_path_factory, shared_cache) -> Path:
    path = tmp_path_factory.mktemp("cli")
    (path / "cache").symlink_to(shared_cache)
    return path


@pytest.fixture(scope="module")
def teacher(folder) -> Path:
    path = folder / "made" / "teacher.safetensors"
    answer = bdense("teacher", "--data", "digits", "--seed", 3, *TINY, "--out", path)
    assert answer.status == 0, answer.err
    digest = denoiser_sha256(load_denoiser(path)[0])
    assert answer.out == f"{path} sha256 {digest[:16]}\n"
    assert re.fullmatch(r"4/4, loss \d\.\d{3}, about 0 s left", answer.err.splitlines()[-1])
    return path


@pytest.fixture(scope="module")
def student(folder, teacher) -> Path:
    path = folder / "student.safetensors"
    answer = done("distill", teacher, "--nfe", 2, "--a", 1.0, *SHORT, "--out", path)
    assert answer == f"2 NFE: {path}\n"
    return path


def fid(student: Path, folder: Path, *options: object) -> dict:
    cache = ("--cache", folder / "cache")
    return json.loads(done("fid", student, *DIGITS, "--images", 64, *cache, *options))


# ---- the way there ----


def test_a_teacher_is_written_with_its_recipe(teacher):
    loaded, metadata = load_denoiser(teacher)
    assert (metadata["kind"], metadata["data"]) == ("teacher", "digits")
    training = metadata["training"]
    assert (training["images"], training["batch"], training["seed"]) == (128, 32, 3)
    assert loaded.image_shape == (1, 8, 8)
    assert loaded.model.config.channel_mult == (1, 2)
    names = sorted(path.name for path in teacher.parent.iterdir())
    assert names == ["teacher.md", "teacher.safetensors"]
    card = teacher.with_suffix(".md").read_text()
    assert card.startswith("---\nlicense: unknown\n")
    assert "training data, digits." in card


def test_a_teacher_may_be_conditional(folder):
    path = folder / "conditional.safetensors"
    options = ("--data", "digits@16", "--conditional", "--attention", 8, "--dropout", 0.25)
    done("teacher", *options, *TINY, "--out", path)
    loaded, metadata = load_denoiser(path)
    network = loaded.model.config
    assert (network.label_dim, network.attn_resolutions, network.dropout) == (10, (8,), 0.25)
    assert (loaded.image_shape, metadata["data"]) == ((1, 16, 16), "digits@16")


def test_a_set_without_labels_cannot_be_conditional(tmp_path):
    (tmp_path / "set").mkdir()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "set/a.png")
    options = ("--data", f"folder:{tmp_path / 'set'}", "--conditional")
    answer = bdense("teacher", *TINY, *options, "--out", tmp_path / "t.safetensors")
    assert "--conditional: data set folder:set has no labels; choose" in refused(answer)


def test_a_student_is_a_teacher_in_size_with_its_own_sampler(student, teacher):
    loaded, metadata = load_denoiser(student)
    parent = load_denoiser(teacher)[0]
    assert loaded.describe() == parent.describe()
    # SFD learns from the teacher alone, without the data set.
    assert (metadata["kind"], metadata["data"]) == ("student", "digits")
    assert metadata["method"] == "sfd-bdense"
    assert metadata["teacher_sha256"] == denoiser_sha256(parent)
    ratios = torch.tensor(metadata["weights"])
    assert (ratios[1:] / ratios[:-1]).tolist() == pytest.approx([2.718282] * 3, rel=1e-5)
    sampler = sampler_from(metadata["sampler"])
    assert (sampler.nfe, sampler.num_intervals, sampler.afs) == (2, 3, True)
    assert denoiser_sha256(loaded) != denoiser_sha256(parent)
    assert not list(student.parent.glob("*.training.*"))


def test_the_same_command_makes_the_same_student(student, teacher, folder):
    first = denoiser_sha256(load_denoiser(student)[0])
    again = folder / "again.safetensors"
    assert distill(teacher, again, "--nfe", 2, "--a", 1.0) == first
    assert distill(teacher, again, "--nfe", 2, "--a", 1.0, "--seed", 1) != first
    assert distill(teacher, again, "--nfe", 2, "--a", 0.0) != first


def test_a_teacher_drawn_by_default_says_with_how_many_evaluations(teacher, student, tmp_path):
    for model, options, said in ((teacher, (), True), (teacher, ("--nfe", 4), False)):
        answer = bdense("sample", model, *options, "--images", 1, "--out", tmp_path / "x.png")
        assert (answer.status, "drawn with 2 network evaluations" in answer.err) == (0, said)
    assert bdense("sample", student, "--images", 1, "--out", tmp_path / "x.png").err == ""


def test_samples_are_one_picture(student, folder):
    def draw(name: str, *options: object) -> Path:
        path = folder / name
        grid = ("--images", 6, "--columns", 3)
        assert done("sample", student, *grid, *options, "--out", path) == f"{path}\n"
        return path

    first = draw("first.png")
    with Image.open(first) as picture:
        assert (picture.size, picture.mode) == ((3 * 34 - 2, 2 * 34 - 2), "L")
        pixels = torch.from_numpy(np.array(picture))
    loaded, metadata = load_denoiser(student)
    images = draw_images(loaded, sampler_from(metadata["sampler"]), 6, seed=0)
    # Every pixel of an 8 x 8 image is a square of 4; 2 lie between two images.
    assert torch.equal(pixels[0:32:4, 34:66:4], images[1, 0])
    assert torch.equal(pixels[34:66:4, 0:32:4], images[3, 0])
    assert draw("same.png", "--seed", 0).read_bytes() == first.read_bytes()
    assert draw("other.png", "--seed", 1).read_bytes() != first.read_bytes()


def test_a_fid_is_the_librarys(student, teacher, folder):
    """With kid, precision and recall beside it; the same seed gives the same numbers."""
    small = ("--kid-subset-size", 32, "--neighbours", 3)
    found = fid(student, folder, "--metrics", "kid", "prc", *small, "--seed", 5)
    cache = folder / "cache"
    extractor = load_extractor("digits-classifier", cache=cache, device=torch.device("cpu"))
    digits = load_dataset("digits")
    loaded, metadata = load_denoiser(student)
    expected = measure_images(
        draw_images(loaded, sampler_from(metadata["sampler"]), 64, seed=5),
        extractor,
        dataset_reference(digits, extractor, cache=cache, with_features=True),
        metrics=("fid", "kid", "prc"),
        settings=MetricSettings(kid_subset_size=32, neighbours=3),
        nfe=2,
        seeds={"evaluation": 5},
    ).as_dict()
    assert found == expected.pop("fid") | expected
    assert fid(student, folder, "--seed", 5).items() <= found.items()
    assert fid(student, folder)["value"] != found["value"]
    assert fid(teacher, folder, "--nfe", 4, "--no-afs")["nfe"] == 4


@pytest.mark.parametrize(
    ("name", "order", "num_intervals"), [("heun", 2, 2), ("dpm2", 2, 2), ("ipndm", 3, 4)]
)
def test_a_teacher_draws_with_any_solver(teacher, folder, name, order, num_intervals):
    solver = make_solver(name, order=order)
    sampler = Sampler(num_intervals=num_intervals, afs=False, solver=solver)
    images = draw_images(load_denoiser(teacher)[0], sampler, 2, seed=0)[:, 0]
    path, grid = folder / "drawn.png", ("--no-afs", "--nfe", 4)
    assert torch.equal(drawn(path, teacher, *grid, "--solver", name, "--order", order), images)
    assert not torch.equal(drawn(path, teacher, *grid), images)


def test_a_reference_file_gives_the_same_fid(student, folder):
    path = folder / "refs" / "digits.npz"
    made = ("reference", "--data", "digits", *DIGITS, "--cache", folder / "cache")
    line = rf"{path} 1797 images of digits, 64 features of digits-classifier [0-9a-f]{{16}}\n"
    assert re.fullmatch(line, done(*made, "--out", path))
    found, expected = fid(student, folder, "--reference", path), fid(student, folder)
    assert re.fullmatch(r"digits\.npz:[0-9a-f]{16}", found.pop("reference"))
    del expected["reference"]
    assert found == expected
    np.savez(path, mu=np.zeros(64), sigma=np.eye(64))  # as EDM writes it
    assert fid(student, folder, "--reference", path)["reference_images"] is None
    options = ("--cache", folder / "cache", "--images", 8, "--reference", path, *DIGITS)
    line = refused(bdense("fid", student, *options, "--metrics", "fid", "prc"))
    assert re.match(r"prc .*, but digits\.npz:\w+ holds .* name the data set instead", line)
    line = refused(bdense("fid", student, *options, "--data", "digits"))
    assert line.endswith("takes the place of a data set, got --data digits; drop one")


# ---- mistakes ----


@pytest.fixture(scope="module")
def broken(folder, student) -> Path:
    path = folder / "broken.safetensors"
    path.write_bytes(student.read_bytes()[:-1000])
    return path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("teacher --data folder:/nowhere --out OUT", "no image folder /nowhere"),
        ("teacher --mult 1 2 --attention 8 16 --out OUT", "--attention 16: .* sides of 8, 4;"),
        ("teacher --out HERE", "--out .* is a folder"),
        ("distill TEACHER --a 1e3 --out OUT", r"branch weights .* got \[inf, inf, inf, inf\]"),
        ("distill TEACHER --plain --a 1 --out OUT", "--plain .* got --a 1; drop one"),
        ("distill TEACHER --method sfdd --out OUT", "'sfdd'; .* did you mean sfd"),
        ("distill TEACHER --steps 8 --out OUT", "--steps; --method progressive or consistency or"),
        ("distill TEACHER --images 64 --out OUT", "--images needs --extractor"),
        ("distill TEACHER --data digitz --out OUT", "digitz"),  # which nothing here needs
        ("distill TEACHER --out HERE", "--out .* is a folder"),
        ("distill BROKEN --out OUT", r"broken\.safetensors"),
        ("sample STUDENT --nfe 5 --out PICTURE", r"\(NFE 2\), and --nfe 5 asks for another"),
        ("sample STUDENT --no-afs --out PICTURE", "and --no-afs asks for another"),
        ("sample STUDENT --solver heun --out PICTURE", "and --solver heun asks for another"),
        ("sample TEACHER --solver heun --out PICTURE", "take --nfe 3 or --no-afs"),
        ("sample TEACHER --solver dpm2 --no-afs --nfe 5 --out PICTURE", "take --nfe 6 or --afs"),
        ("sample STUDENT --out HERE", "--out .* is a folder"),
        ("sample STUDENT --out BROKEN/x.png", "--out .*broken.safetensors/x.png"),
        ("sample BROKEN --out PICTURE", r"broken\.safetensors"),
        ("fid STUDENT --data digit", "unknown data set 'digit'"),
        ("fid STUDENT --reference no.npz", "no reference file no.npz"),
        ("fid STUDENT --metrics kid --images 8", "kid needs at least 1000 images, got 8"),
        ("fid BROKEN", r"broken\.safetensors"),
    ],
)
def test_what_cannot_be_done_is_refused(refusal, shared_cache, words, message):
    verb = words.split()[0]
    more = {"distill": SHORT, "fid": (*DIGITS, "--cache", shared_cache)}.get(verb, ())
    assert re.search(message, refusal(words, *more))


def test_usage_mistakes_end_with_status_2():
    for arguments in ((), ("distil",), ("teacher",), ("sample", "x", "--images", "many")):
        answer = bdense(*arguments)
        assert (answer.status, answer.out) == (2, "")
        assert answer.err.splitlines()[-1].startswith("bdense")


def test_a_loss_that_diverges_is_a_failure_and_leaves_no_file(teacher, tmp_path):
    answer = bdense("distill", teacher, *SHORT, "--lr", 1e30, "--out", tmp_path / "s.safetensors")
    assert answer.status == 1
    assert "is not finite at iteration 0, interval 2" in answer.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (MemoryError(), 1, "out of memory"),
        (torch.OutOfMemoryError("Tried to allocate 2 GiB.\nAnd more"), 1, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "out of memory"),
        (TypeError("Cannot convert a MPS Tensor to float64 dtype"), 2, "--device mps"),
    ],
)
def test_what_a_machine_cannot_do_is_one_line(error, status, said, capsys):
    def call() -> None:
        raise error

    assert run_verb("bdense", call, on_interrupt="") == status
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


@pytest.mark.parametrize("error", [RuntimeError, TypeError])
def test_other_errors_of_the_program_are_not_hidden(error):
    def call() -> None:
        raise error("a mistake of ours")

    with pytest.raises(error, match="of ours"):
        run_verb("bdense", call, on_interrupt="")


def test_a_resumed_run_is_timed_by_its_own_iterations(monkeypatch, capsys):
    now = iter([0.0, 10.0, 14.0])
    monkeypatch.setattr("bdense.verbs.common.time.monotonic", lambda: next(now))
    show = Progress()
    show(901, 1000, "loss 1")  # nothing to tell from yet
    show(903, 1000, "loss 1")
    assert capsys.readouterr().err == "903/1000, loss 1, about 194 s left\n"


# ---- the library ----


def test_readmes_ten_lines_make_what_the_command_makes(teacher, tmp_path, monkeypatch):
    """But for their length."""
    text = (Path(__file__).parents[1] / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    code = code.replace("kimg=12.8", "kimg=0.064, batch=32").replace("64, seed", "6, seed")
    monkeypatch.chdir(tmp_path)
    shutil.copy(teacher, "teacher.safetensors")
    exec(code, {})
    by_command = tmp_path / "s.safetensors"
    distill(teacher, by_command, "--a", 0)
    picture = tmp_path / "command.png"
    assert bdense("sample", by_command, "--images", 6, "--out", picture).status == 0
    assert (tmp_path / "samples.png").read_bytes() == picture.read_bytes()


# ---- what a model is compared with ----


def test_fid_compares_with_the_models_own_data(tmp_path, shared_cache):
    path = tmp_path / "x.safetensors"
    options = ("--images", 4, *DIGITS, "--cache", shared_cache)
    save_denoiser(path, small_teacher(), {"kind": "teacher", "data": "digits"})
    assert json.loads(done("fid", path, *options))["reference"] == "digits"
    for known, said in (({}, "does not say"), ({"data": "folder:cats"}, "folder:cats; ")):
        save_denoiser(path, small_teacher(), {"kind": "teacher", **known})
        line = refused(bdense("fid", path, *options))
        assert line.startswith("--data is missing: ")
        assert said in line
        done("fid", path, *options, "--data", "digits")


@pytest.mark.parametrize(
    ("channels", "data", "extractor"),
    [
        (3, "digits", "digits-classifier"),
        (1, "digits@16", "digits-classifier"),
    ],
)
def test_other_images_are_refused_before_one_is_drawn(
    tmp_path, shared_cache, monkeypatch, channels, data, extractor
):
    path = tmp_path / "x.safetensors"
    save_denoiser(path, small_teacher(channels=channels), {"kind": "teacher"})

    def drawn(*_: object, **__: object) -> None:
        raise AssertionError("an image was drawn")

    monkeypatch.setattr("bdense.verbs.evaluation.draw_images", drawn)
    options = ("--data", data, "--extractor", extractor, "--cache", shared_cache, "--images", 4)
    assert "digits" in refused(bdense("fid", path, *options))
    teacher = tmp_path / "t.safetensors"
    save_denoiser(teacher, small_teacher(channels=channels), {"kind": "teacher"})
    out = ("--out", tmp_path / "s.safetensors")
    assert "digits" in refused(bdense("distill", teacher, *SHORT, *options, *out))
    assert not (tmp_path / "s.safetensors").exists()


@pytest.mark.parametrize(
    "command",
    ["bdense sample AT.safetensors --nfe 4 --out AT.png", "bdense --version", "search --version"],
)
def test_a_closed_standard_output_is_no_mistake(tmp_path, command):
    save_denoiser(tmp_path / "x.safetensors", small_teacher(), {"kind": "teacher"})
    command = f"exec {sys.executable} -m {command} >&-".replace("AT", f"{tmp_path}/x")
    found = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (0, "")
    assert (tmp_path / "x.png").exists() == ("sample" in command)
