"""Model folders: written whole or not at all, and what is read from them."""

import json
import os
import re
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import bdense
from bdense.diffusion.branches import widen_head
from bdense.diffusion.ddpm import DDPMSchedule
from bdense.diffusion.sampling import Sampler, draw_images, served_metadata
from bdense.diffusion.solvers import DDIM
from bdense.diffusion.vp import CosineSchedule
from bdense.errors import CheckpointError, InputError
from bdense.methods import METHODS
from bdense.models.card import folder_card, model_card
from bdense.models.folder import export_folder
from bdense.models.store import denoiser_sha256, load_model
from tests.commands import bdense as command
from tests.commands import done, refused
from tests.disks import largest_file, names
from tests.small import same_weights, small_teacher

SAMPLER = Sampler(
    num_intervals=4,
    afs=False,
    schedule=DDPMSchedule(num_train_timesteps=50, beta_end=0.2),
    solver=DDIM(clip=True),
)
STUDENT = {
    "kind": "student",
    "method": "pd-bdense",
    "paper": "Progressive Distillation (arXiv 2202.00512)",
    "weights": [0.5, 0.5],
    "licence": "CC-BY-4.0",
    "sampler": SAMPLER.describe(),
}
EVERY_FILE = ["README.md", "config.json", "model.safetensors", "samples.png"]


def block(card: str, language: str) -> str:
    return re.search(rf"^```{language}\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)[1]


# ---- what is in it ----


def test_the_student_comes_back_bit_for_bit(tmp_path):
    student, folder = small_teacher(dropout=0.5).train(), tmp_path / "runs" / "student"
    paths = export_folder(folder, student, STUDENT)
    assert [path.relative_to(folder).as_posix() for path in paths] == [
        "model.safetensors",
        "config.json",
        "README.md",
        "samples.png",
    ]
    assert names(folder) == EVERY_FILE
    assert student.training
    drawn = draw_images(student.eval(), SAMPLER, 64, seed=0)
    bdense.save_grid(drawn, tmp_path / "eval.png")
    assert paths[3].read_bytes() == (tmp_path / "eval.png").read_bytes()
    for source in (folder, str(folder), folder / "model.safetensors"):
        loaded, metadata = load_model(source)
        assert same_weights(loaded, student)
        assert metadata == STUDENT
        assert bdense.samplers_from(metadata) == [SAMPLER]
    readable = json.loads((folder / "config.json").read_text())
    assert readable == {
        "file": "model.safetensors",
        **STUDENT,
        "image_shape": [1, 8, 8],
        "classes": 0,
        "parameters": sum(parameter.numel() for parameter in student.parameters()),
        "weights_sha256": denoiser_sha256(student),
        "architecture": json.loads(json.dumps(student.describe())),
    }


@pytest.mark.parametrize("schedule", [SAMPLER.schedule, CosineSchedule()], ids=lambda s: s.kind)
def test_the_card_says_how_to_draw_the_images_beside_it(tmp_path, monkeypatch, schedule):
    """Its Python and its command, run as they stand where the folder lies."""
    sampler = Sampler(num_intervals=4, afs=False, schedule=schedule, solver=DDIM())
    student, folder = small_teacher(), tmp_path / "student"
    export_folder(folder, student, STUDENT | {"sampler": sampler.describe()})
    card = (folder / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(block(card, "python"), found)
    assert torch.equal(found["images"], draw_images(student, sampler, 64, seed=0))
    drawn = (folder / "samples.png").read_bytes()
    assert Path("samples.png").read_bytes() == drawn
    Path("samples.png").unlink()
    program, *arguments = block(card, "sh").split()
    assert program == "bdense"
    assert done(*arguments) == "samples.png\n"
    assert Path("samples.png").read_bytes() == drawn
    assert done("sample", "student", "--solver", "ddim", "--nfe", 4, "--out", "x.png") == "x.png\n"
    assert Path("x.png").read_bytes() == drawn
    message = refused(command("sample", "student", "--nfe", 3, "--out", "x.png"))
    assert message.startswith("student draws with the sampler it was distilled for (NFE 4), and")


def test_pictures_are_copied_or_written_and_shown(tmp_path):
    plot = tmp_path / "plot.png"
    plot.write_bytes(b"a plot")
    pictures = {
        "fid.png": plot,
        "samples.png": lambda path: path.write_bytes(b"samples"),
        "rounds.png": lambda path: path.write_bytes(b"rounds"),
    }
    folder, extra = tmp_path / "student", "## Beside it\n\nSeeds 0 to 2.\n"
    paths = export_folder(folder, small_teacher(), STUDENT, pictures=pictures, extra_card=extra)
    assert [path.name for path in paths[3:]] == ["samples.png", "fid.png", "rounds.png"]
    assert [path.read_bytes() for path in paths[3:]] == [b"samples", b"a plot", b"rounds"]
    card = (folder / "README.md").read_text()
    assert re.findall(r"^!\[(.+)\]\((.+)\)$", card, re.MULTILINE) == [
        ("samples", "samples.png"),
        ("fid", "fid.png"),
        ("rounds", "rounds.png"),
    ]
    assert card.endswith("\n\n## Beside it\n\nSeeds 0 to 2.\n")


# ---- the card ----


def test_the_card_of_a_folder_begins_as_that_of_a_file():
    """What it is, and whose terms it carries."""
    file, folder = (make("x", small_teacher(), STUDENT) for make in (model_card, folder_card))
    head = file.split("\n\n```sh")[0]
    assert folder.startswith(f"{head}\n\n## How to sample\n\n```sh\nbdense sample x --images 64")
    assert "license: cc-by-4.0\nlibrary_name: bdense\n" in head
    row = "| sampler | 4 DDIM steps, ddpm levels, even in time, predictions clipped to [-1, 1] |"
    assert row in head


def test_fids_are_a_table_with_their_shared_conditions_below():
    shared = {"images": 50_000, "extractor": "inception", "extractor_sha256": "ab" * 32}
    rows = [
        {"steps": 8, "arm": "plain PD", "fid": 3.2, "std_err": 0.1234, "n": 3, **shared},
        {"steps": 8, "arm": "B-DENSE", "fid": 3.01749, "std_err": None, "n": 1, **shared},
    ]
    card = folder_card("x", small_teacher(), STUDENT | {"fid_table": rows})
    *_, header, _, plain, ours, _, below = card.splitlines()
    assert header == "| steps | arm | FID | standard error | n |"
    assert plain == "| 8 | plain PD | 3.2 | 0.12 | 3 |"
    assert ours == "| 8 | B-DENSE | 3.017 | - | 1 |"
    assert "images 50000, extractor inception, extractor sha256 abababababababab" in below
    assert "FID |" not in folder_card("x", small_teacher(), STUDENT | {"fid_table": []})


def test_a_condition_that_differs_is_a_column_and_an_empty_column_is_left_out():
    rows = [
        {"nfe": 2, "fid": 5.0, "std_err": None, "training_images": 1000, "why": "a|b"},
        {"nfe": 1, "fid": None, "std_err": None, "training_images": 500, "why": "a|b"},
        {"nfe": 1, "fid": 7.0},
    ]
    card = folder_card("x", small_teacher(), STUDENT | {"fid_table": rows})
    header, _, *rest = card.splitlines()[-5:]
    assert header == "| NFE | FID | training images | why |"
    assert rest == ["| 2 | 5 | 1000 | a\\|b |", "| 1 | - | 500 | a\\|b |", "| 1 | 7 | - | - |"]


@pytest.mark.parametrize("method", METHODS.values())
def test_methods_are_named_with_their_papers(method):
    student, dense = STUDENT | {"paper": method.paper}, " with dense branch supervision"
    card = model_card("x", small_teacher(), student)
    assert f"\nA few-step student of a diffusion model, distilled by {method.paper}{dense}" in card
    assert dense not in model_card("x", small_teacher(), student | {"weights": [1.0]})


def test_the_python_of_a_student_for_several_nfe_lists_them(tmp_path):
    samplers = [Sampler(num_intervals=n, afs=True) for n in (3, 4, 6)]
    card = folder_card("x", small_teacher(), STUDENT | served_metadata(samplers))
    assert "\nsampler = bdense.samplers_from(metadata)[0]  # the others: NFE 3, 5\n" in card


# ---- whole or not at all ----


# The weights take 200 kB: one disk is too small for them, the other for the picture after them.
@pytest.mark.parametrize("count", [100_000, 300_000])
def test_a_full_disk_leaves_nothing(tmp_path, count):
    pictures = {"plot.png": lambda path: path.write_bytes(bytes(count + 1))}
    # pytest's own files stay below it.
    with largest_file(count), pytest.raises(Exception, match=r"(?i)file too large"):
        export_folder(tmp_path / "student", small_teacher(), STUDENT, pictures=pictures)
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_half_a_folder_is_never_seen(tmp_path, error):
    folder, seen = tmp_path / "student", []

    def fail_late(path: Path) -> None:
        path.write_bytes(b"half")
        seen.extend(names(path.parent))
        assert not folder.exists()
        raise error("midway")

    with pytest.raises(error, match="midway"):
        export_folder(folder, small_teacher(), STUDENT, pictures={"plot.png": fail_late})
    # What comes before it was there already, and elsewhere.
    assert seen == ["config.json", "model.safetensors", "plot.png"]
    assert names(tmp_path) == []


def test_everything_is_synced_before_the_name_appears(tmp_path, monkeypatch):
    folder, synced, real = tmp_path / "student", {}, os.fsync

    def fsync(descriptor: int) -> None:
        synced[os.fstat(descriptor).st_ino] = folder.exists()
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    paths = export_folder(folder, small_teacher(), STUDENT)
    assert [synced[path.stat().st_ino] for path in (*paths, folder)] == [False] * 5
    assert synced[tmp_path.stat().st_ino]


def test_the_folder_has_the_permissions_of_new_files(tmp_path):
    before = os.umask(0o027)
    try:
        paths = export_folder(tmp_path / "student", small_teacher(), STUDENT)
    finally:
        os.umask(before)
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (*paths, tmp_path / "student")]
    assert modes == [0o640] * 4 + [0o750]


# ---- what is refused ----


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_what_exists_is_refused_before_any_work(tmp_path, kind):
    folder, called = tmp_path / "student", []
    if kind == "folder":
        folder.mkdir()
    elif kind == "file":
        folder.write_text("mine")
    else:
        folder.symlink_to("nowhere")
    with pytest.raises(InputError) as caught:
        export_folder(folder, small_teacher(), STUDENT, pictures={"plot.png": called.append})
    assert f"{folder} exists already" in str(caught.value)
    assert called == []
    assert names(tmp_path) == ["student"]


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path):
    def quicker(path: Path) -> None:
        path.write_bytes(b"picture")
        (tmp_path / "student").mkdir()
        (tmp_path / "student" / "mine").write_text("mine")

    with pytest.raises(InputError, match="exists already"):
        export_folder(tmp_path / "student", small_teacher(), STUDENT, pictures={"p.png": quicker})
    assert names(tmp_path) == ["student"]
    assert names(tmp_path / "student") == ["mine"]


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        ({"a/b.png": len}, r"'a/b\.png'"),
        ({"../b.png": len}, "plain file name"),
        ({".b.png": len}, "plain file name"),
        ({"a b.png": len}, "plain file name"),
        ({"README.md": len}, "plain file name"),
        ({"model.safetensors": len}, "plain file name"),
        ({"plot.png": Path("none.png")}, r"no picture none\.png .*plot\.png"),
        ({"plot.png": lambda path: None}, r"plot\.png wrote no file"),
    ],
)
def test_pictures_that_cannot_be_taken(tmp_path, pictures, message):
    with pytest.raises(InputError, match=message):
        export_folder(tmp_path / "student", small_teacher(), STUDENT, pictures=pictures)
    assert names(tmp_path) == []


def test_only_a_finished_student_is_exported(tmp_path):
    with pytest.raises(InputError, match=r"no sampler.*Sampler\(\.\.\.\)\.describe"):
        export_folder(tmp_path / "x", small_teacher(), {"kind": "teacher"})
    with pytest.raises(InputError, match=r"3 branches, .* export_branch"):
        export_folder(tmp_path / "x", widen_head(small_teacher(), 3), STUDENT)
    assert names(tmp_path) == []


# ---- what is read ----


def test_a_folder_that_is_damaged_is_named(tmp_path):
    weights = export_folder(tmp_path / "student", small_teacher(), STUDENT)[0]
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(
        CheckpointError, match=r"student/model\.safetensors cannot be read as safe"
    ):
        load_model(tmp_path / "student")


def test_weights_of_others_in_a_folder_do_not_hide_it(tmp_path):
    """They are left to the reader of diffusers' folders, as before."""
    pytest.importorskip("diffusers", reason="needs the diffusers extra")
    from tests.test_diffusers_teacher import new_scheduler, new_unet, save

    folder = save(tmp_path / "ddpm", new_unet(), new_scheduler())
    expected = load_model(folder)[0]
    save_file({"other": torch.zeros(1)}, folder / "model.safetensors")
    assert same_weights(load_model(folder)[0], expected)
