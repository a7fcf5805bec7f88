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


def test_plain_sfd_has_one_weight(teacher, folder):
    path = folder / "plain.safetensors"
    distill(teacher, path, "--plain", "--nfe", 3, "--no-afs", "--schedule", "logsnr")
    metadata = load_denoiser(path)[1]
    assert (metadata["method"], metadata["weights"]) == ("sfd", [1.0])
    assert metadata["sampler"]["num_intervals"] == 3
    assert metadata["sampler"]["schedule"]["kind"] == "logsnr"


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


def test_a_student_learns_from_the_solver_asked_for(student, teacher, folder):
    """With any solver of the teacher, the student takes Euler steps."""
    path, own = folder / "heun.safetensors", load_denoiser(student)
    heun = distill(teacher, path, "--nfe", 2, "--a", 1.0, "--solver", "heun")
    assert heun != denoiser_sha256(own[0])
    assert load_denoiser(path)[1]["sampler"] == own[1]["sampler"]


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--data", "folder:/nowhere"), "there is no image folder /nowhere"),
        (("--attention", 8, 16), r"--attention 16: with 2 numbers in --mult .* sides of 8, 4;"),
    ],
)
def test_a_teacher_that_cannot_be_trained_is_refused(tmp_path, options, message):
    answer = bdense("teacher", *TINY, "--out", tmp_path / "teacher.safetensors", *options)
    assert re.search(message, refused(answer))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--a", 1e3), r"branch weights must be finite numbers .* got \[inf, inf, inf, inf\]"),
        (("--plain", "--a", 1), "--plain leaves one branch, .* got --a 1; drop one"),
        (("--method", "sfdd"), "no method is called 'sfdd'; .* did you mean sfd"),
        (
            ("--steps", 8),
            "--method sfd has no option --steps; --method progressive or consistency or epd",
        ),
        (("--images", 64), "--images needs --extractor"),
        (("--data", "digitz"), "digitz"),  # which nothing here needs
    ],
)
def test_a_student_that_cannot_be_distilled_is_refused(teacher, tmp_path, options, message):
    answer = bdense("distill", teacher, *SHORT, "--out", tmp_path / "s.safetensors", *options)
    assert re.search(message, refused(answer))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("student", ("--nfe", 5), r"distilled for \(NFE 2\), and --nfe 5 asks for another"),
        ("student", ("--no-afs",), "and --no-afs asks for another"),
        ("student", ("--solver", "heun"), r"\(NFE 2\), and --solver heun asks for another"),
        ("teacher", ("--solver", "heun"), "heun .* --nfe 2 with --afs; take --nfe 3 or --no-afs"),
        ("teacher", ("--solver", "dpm2", "--no-afs", "--nfe", 5), "take --nfe 6 or --afs"),
    ],
)
def test_what_cannot_be_drawn_is_refused(request, tmp_path, model, options, message):
    path = request.getfixturevalue(model)
    answer = bdense("sample", path, *options, "--out", tmp_path / "x.png")
    assert re.search(message, refused(answer))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--data", "digit"), "unknown data set 'digit'"),
        ((*DIGITS, "--reference", "no.npz"), "no reference file no.npz"),
        ((*DIGITS, "--metrics", "kid"), "kid needs at least 1000 images, got 8"),
    ],
)
def test_a_fid_that_cannot_be_measured_is_refused(student, tmp_path, options, message):
    answer = bdense("fid", student, "--images", 8, "--cache", tmp_path, *options)
    assert re.search(message, refused(answer))


def test_an_output_that_is_a_folder_is_refused_before_the_work(teacher, student, tmp_path):
    for command in (("teacher", *TINY), ("distill", teacher, *SHORT), ("sample", student)):
        line = refused(bdense(*command, "--out", tmp_path))
        assert line == f"--out {tmp_path} is a folder; give the name of a file"
    (tmp_path / "file").write_text("in the way")
    line = refused(bdense("sample", student, "--out", tmp_path / "file" / "x.png"))
    assert line.startswith(f"--out {tmp_path / 'file' / 'x.png'}")


def test_a_truncated_checkpoint_is_named(student, tmp_path):
    broken, out = tmp_path / "broken.safetensors", tmp_path / "out"
    whole = student.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    for command in (
        ("distill", broken, "--out", out),
        ("sample", broken, "--out", out),
        ("fid", broken, "--cache", tmp_path / "cache"),
    ):
        assert "broken.safetensors" in refused(bdense(*command))
    assert not out.exists()


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
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nAnd a long story"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_too_little_memory_is_one_line(error, capsys):
    def call() -> None:
        raise error

    assert run_verb("bdense", call, on_interrupt="") == 1
    assert capsys.readouterr().err.startswith("bdense: out of memory; ")


def test_what_an_apple_gpu_cannot_compute_is_one_line(capsys):
    def call() -> None:  # as torch words it
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    assert run_verb("bdense", call, on_interrupt="") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--device mps" in line


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


def test_a_student_comes_with_a_card_of_its_teachers_terms(folder, teacher, tmp_path):
    loaded, metadata = load_denoiser(teacher)
    owned = tmp_path / "owned.safetensors"
    save_denoiser(owned, loaded, metadata | {"licence": "CC-BY-NC-SA-4.0", "source": "edm-x"})
    student = tmp_path / "student.safetensors"
    distill(owned, student, "--nfe", 1)
    metadata = load_denoiser(student)[1]
    assert (metadata["licence"], metadata["teacher"]) == ("CC-BY-NC-SA-4.0", "edm-x")
    card = student.with_suffix(".md").read_text()
    assert card.startswith("---\nlicense: cc-by-nc-sa-4.0\n")
    assert "| teacher | edm-x |" in card


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


def test_a_closed_standard_output_is_no_mistake(tmp_path):
    path = tmp_path / "x.safetensors"
    save_denoiser(path, small_teacher(), {"kind": "teacher"})
    draw = f"sample {path} --nfe 2 --images 2 --out {tmp_path / 'x.png'}"
    command = f"exec {sys.executable} -m bdense {draw} >&-"
    found = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (0, "")
    assert (tmp_path / "x.png").exists()


@pytest.mark.parametrize("package", ["bdense", "search"])
def test_a_version_on_a_closed_standard_output_is_no_mistake(package):
    command = f"exec {sys.executable} -m {package} --version >&-"
    found = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (0, "")
