"""Model folders of a study's rows: whose student, with which figures, and what is refused."""

import json
from pathlib import Path

import fsspec
import pytest
from PIL import Image
from search.analysis.promotion import confirmed_arm, given_arm, plan_progressive, plan_retraining
from search.analysis.transfer import plan_transfer
from search.worker.engine import student_sampler

from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.diffusion.sampling import Sampler
from bdense.errors import InputError
from bdense.models.sources import load_model
from bdense.models.store import denoiser_sha256, load_denoiser, save_denoiser
from search.export import export_trial, promoted_row
from search.run import launch
from search.storage.engine import runs_folder
from search.storage.ledger import Ledger
from search.study.arms import Planned
from search.study.study import Study
from tests.measured import (
    command,
    confirmed_valley,
    copy_storage,
    empty_storage,
    finish,
    normalised,
    open_once,
    refused,
    searched_valley,
)
from tests.small import small_teacher
from tests.studies import NORMALISED, promotion, write
from tests.test_confirmation import confirmation
from tests.test_promotion import last_fid

FOLDER = ["README.md", "config.json", "model.safetensors", "samples.png"]
PAPER = given_arm("1.386,-4.274")


@pytest.fixture
def made(tmp_path_factory) -> Path:
    """Where storages lie that are made once."""
    return tmp_path_factory.getbasetemp()


@pytest.fixture
def url(tmp_path, made, monkeypatch) -> str:
    monkeypatch.setenv("BDENSE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("BDENSE_STORAGE", f"sqlite:///{tmp_path / 'study.db'}")
    open_once(monkeypatch)
    monkeypatch.setattr(launch, "check_apart", launch._check)
    return copy_storage(empty_storage(made), tmp_path / "study.db")


@pytest.fixture
def searched(url, tmp_path, made) -> Study:
    copy_storage(searched_valley(made), tmp_path / "study.db")
    return Study.open(url, "digits")


@pytest.fixture
def confirmed(url, tmp_path, made) -> Study:
    copy_storage(confirmed_valley(made), tmp_path / "study.db")
    return Study.open(url, "digits")


def student(number: int) -> NetworkDenoiser:
    return small_teacher(seed=number)


def keep(ledger: Ledger, *numbers: int, sampler: Sampler | None = None) -> None:
    """Put a student of its own where each row says that it lies."""
    sampler = sampler or student_sampler(normalised())
    for number in numbers:
        path = runs_folder() / ledger.study.trials[number].user_attrs["student"]
        metadata = {"kind": "student", "sampler": sampler.describe(), "identity": {"a": 1}}
        save_denoiser(path, student(number), metadata)


def exported(record: Study | Planned, folder: Path, *, number=None, steps=None) -> dict:
    """The metadata of the folder that is written, and whose student it holds."""
    assert export_trial(record, folder, number=number, steps=steps) == [folder]
    denoiser, metadata = load_model(str(folder))
    return metadata | {"weights_sha256": denoiser_sha256(denoiser)}


def is_of(metadata: dict, number: int) -> bool:
    return metadata["weights_sha256"] == denoiser_sha256(student(number))


# ---- whose student ----


def test_without_a_confirmation_it_is_the_best_trial_s(searched, tmp_path):
    keep(searched.trials, 2, 3)
    assert is_of(exported(searched, tmp_path / "model"), 3)
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == FOLDER
    with Image.open(tmp_path / "model/samples.png") as picture:
        assert picture.size[0] >= 64
    assert is_of(exported(searched, tmp_path / "other", number=2), 2)


def test_after_one_it_is_the_winner_s_under_the_first_fresh_seed(confirmed, tmp_path):
    """Trial 2, the second candidate: row 3 of the confirmation, at the budget confirmed."""
    assert confirmed_arm(confirmed).trial == 2
    planned = Planned.open(confirmed.url, "digits.confirm")
    keep(planned.ledger, *range(4))
    metadata = exported(confirmed, tmp_path / "model")
    assert is_of(metadata, 3)
    assert metadata["fid"]["seeds"] == {"training": 1, "evaluation": 1}
    assert "identity" not in metadata


def test_of_a_confirmation_that_has_not_ended_it_is_the_best_trial_s(searched, tmp_path):
    planned = confirmation(searched)
    finish(planned, lambda arm, row: 10.0 - row.arm, most=5)
    keep(searched.trials, 3)
    assert is_of(exported(searched, tmp_path / "model"), 3)


def test_of_a_confirmation_it_is_its_winner_s(confirmed, tmp_path):
    planned = Planned.open(confirmed.url, "digits.confirm")
    keep(planned.ledger, *range(12))
    metadata = exported(planned, tmp_path / "model")
    assert is_of(metadata, 3)
    table = metadata["fid_table"]
    assert [(row["arm"], row["n"], row["fid"]) for row in table] == [
        ("plain SFD", 3, 12.25),
        ("uniform weights", 3, 11.25),
        ("a 1.250 (trial 3)", 3, 10.25),
        ("a 0.750 (trial 2)", 3, 9.25),
    ]
    assert (table[0]["nfe"], table[0]["kimg"], table[0]["seeds"]) == (2, 2.56, "1 2 3")
    assert is_of(exported(planned, tmp_path / "other", number=6), 6)
    assert "a 1.250 (trial 3)" in (tmp_path / "model/README.md").read_text()


def test_of_several_arms_one_must_be_named(confirmed, tmp_path):
    to = normalised(name="others")
    planned = plan_transfer(confirmed, normalised(), to, top=2, seeds=1)
    finish(planned, lambda arm, row: 9.0 - row.arm)
    with pytest.raises(InputError) as error:
        exported(planned, tmp_path / "model")
    assert str(error.value) == (
        "others.from.digits has 2 arms beside its baselines (a 1.250 (trial 3), a 0.750 (trial "
        "2)); name a row by --trial"
    )
    keep(planned.ledger, 2)
    assert is_of(exported(planned, tmp_path / "model", number=2), 2)


def test_a_baseline_s_student_may_be_asked_for(searched, tmp_path):
    assert searched.baselines is not None
    keep(searched.baselines, 0, 1)
    assert export_trial(searched, tmp_path / "plain", baseline="sfd") == [tmp_path / "plain"]
    folder = tmp_path / "uniform"
    assert command("export", "digits", folder, "--baseline", "uniform").out == f"{folder}\n"
    denoiser, _ = load_model(str(folder))
    assert denoiser_sha256(denoiser) == denoiser_sha256(student(1))
    planned = confirmation(searched)
    with pytest.raises(InputError, match="--baseline sfd is of a search; name a row by --trial"):
        export_trial(planned, tmp_path / "none", baseline="sfd")


def test_trained_again_it_is_that_of_the_nfe_and_budget_asked_for(confirmed):
    arm = confirmed_arm(confirmed)
    for kimg, nfes in ((5.0, [2, 3]), (20.0, [2])):
        planned = plan_retraining(confirmed, normalised(), arm, nfes=nfes, kimg=kimg, seeds=1)
        finish(planned, lambda arm, row: 9.0 - row.arm)
    found = {
        (nfe, kimg): promoted_row(planned, nfe=nfe, kimg=kimg)
        for nfe, kimg in ((2, 5.0), (3, 5.0), (2, 20.0))
    }
    assert found == {(2, 5.0): 2, (3, 5.0): 5, (2, 20.0): 8}
    assert promoted_row(planned) == 2
    assert promoted_row(planned, arm=arm.name, nfe=3) == 5
    with pytest.raises(InputError, match="none of the promoted weights' rows at NFE 3 and 20 kim"):
        promoted_row(planned, nfe=3, kimg=20.0)


# ---- of a chain ----


@pytest.fixture
def chain(url) -> Planned:
    """Seeds 0 and 1; every row has its rounds and their pictures."""
    planned = plan_progressive(url, promotion(), PAPER, of="digits", seeds=(0, 1))
    finish(planned, last_fid)
    for trial in planned.ledger.study.trials:
        last = runs_folder() / trial.user_attrs["student"]
        for steps in (4, 2):
            sampler = student_sampler(normalised())
            metadata = {"kind": "student", "sampler": sampler.describe()}
            path = last.with_name(f"{steps:05d}.safetensors")
            save_denoiser(path, student(10 * trial.number + steps), metadata)
            Image.new("L", (8, 8), 10 * trial.number + steps).save(
                last.with_name(f"{steps:05d}-samples.png")
            )
    return planned


def shade(path: Path) -> int:
    with Image.open(path) as picture:
        return picture.getpixel((0, 0))


def test_a_chain_s_student_comes_with_all_rounds_and_each_arm_s_pictures(chain, tmp_path):
    folder = tmp_path / "model"
    metadata = exported(chain, folder)
    assert is_of(metadata, 22)  # row 2, seed 0, at 2 steps
    assert metadata["fid"]["value"] == 7.0
    assert [(row["steps"], row["arm"], row["fid"]) for row in metadata["fid_table"]][-1] == (
        2,
        "a 1.386 (given)",
        7.5,
    )
    pictures = ["fid.png", "samples-plain.png", "samples-promoted.png", "samples-uniform.png"]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*FOLDER, *pictures])
    assert [shade(folder / name) for name in pictures[1:]] == [2, 22, 12]
    card = (folder / "README.md").read_text()
    assert "All rounds of the promotion:" in card
    for name in pictures:
        assert f"]({name})" in card


def test_an_earlier_round_and_another_row_may_be_asked_for(chain, tmp_path):
    early = exported(chain, tmp_path / "early", steps=4)
    assert is_of(early, 24)
    assert (early["fid"]["value"], early["fid"]["nfe"]) == (6.0, 4)
    assert shade(tmp_path / "early/samples-promoted.png") == 24
    plain = exported(chain, tmp_path / "plain", number=3)
    assert is_of(plain, 32)
    assert shade(tmp_path / "plain/samples-uniform.png") == 42


def test_a_diffusers_network_is_also_written_as_a_pipeline(url, tmp_path, capsys):
    pytest.importorskip("diffusers", reason="needs the diffusers extra")
    from tests.test_diffusers_export import own, student_of, told

    planned = plan_progressive(url, promotion(), PAPER, of=None, seeds=(0,))
    finish(planned, last_fid)
    denoiser = student_of(tmp_path / "teacher", prediction_type="v_prediction")
    last = runs_folder() / planned.ledger.study.trials[2].user_attrs["student"]
    save_denoiser(last, denoiser, told(own(denoiser)))
    folder = tmp_path / "model"
    assert export_trial(planned, folder, number=None, steps=None) == [
        folder,
        folder / "diffusers",
    ]
    assert (folder / "diffusers/model_index.json").exists()
    # What diffusers cannot draw is told, and the folder is there all the same.
    save_denoiser(last, denoiser, told(own(denoiser, 7)))
    other = tmp_path / "other"
    assert export_trial(planned, other, number=None, steps=None) == [other]
    assert capsys.readouterr().err.startswith("no diffusers pipeline is written: ")


# ---- what is refused ----


def test_what_there_is_not_is_refused(searched, chain, tmp_path):
    keep(searched.trials, 3)

    def message(record, **asked) -> str:
        with pytest.raises(InputError) as error:
            exported(record, tmp_path / "model", **asked)
        assert not (tmp_path / "model").exists()
        return str(error.value)

    assert message(searched, number=9) == (
        "trial 9 of digits is not complete, or there is none; complete are 0, 1, 2, 3, 4, 5"
    )
    gone = tmp_path / "runs/digits/00000/student.safetensors"
    assert message(searched, number=0) == (
        f"the student of trial 0 was not kept, only its result: {gone} is gone, as a search keeps "
        "the students of its best trials alone (keep_students of its file: raise it before the "
        "next launch, or name a trial by `clean --keep`); kept are those of 3"
    )
    assert message(searched, steps=4) == (
        "--steps 4 is of a promotion's chain, and this student is of SFD; leave it out"
    )
    assert message(chain, steps=8) == "row 2 has no student of 8 steps; choose from 2, 4"


def test_of_rows_that_have_not_come_so_far_nothing_is_exported(searched, tmp_path):
    url = searched.url
    planned = plan_progressive(url, promotion(), PAPER, of=None, seeds=(0,))
    with pytest.raises(InputError, match="no row of promote-digits is complete, so there is no"):
        exported(planned, tmp_path / "model")
    finish(planned, last_fid, most=2)
    with pytest.raises(
        InputError, match="none of the promoted weights' rows is complete; run the"
    ):
        exported(planned, tmp_path / "model")


# ---- on the command line ----


def test_a_folder_is_written_and_named(searched, tmp_path):
    keep(searched.trials, 3)
    folder = tmp_path / "model"
    assert command("export", "digits", folder).out == f"{folder}\n"
    config = json.loads((folder / "config.json").read_text())
    assert config
    assert refused(command("export", "digits", folder)) == (
        f"{folder} exists already; choose another folder or delete it"
    )


def test_a_folder_may_lie_wherever_fsspec_leads(searched, tmp_path):
    keep(searched.trials, 3)
    url = f"file://{tmp_path}/bucket/model"
    assert command("export", "digits", url).out == f"{url}\n"
    assert sorted(path.name for path in (tmp_path / "bucket/model").iterdir()) == FOLDER
    denoiser, _ = load_model(str(tmp_path / "bucket/model"))
    assert is_of({"weights_sha256": denoiser_sha256(denoiser)}, 3)
    assert refused(command("export", "digits", url)) == (
        f"{url} exists already; choose another place or delete it"
    )
    assert command("export", "digits", "memory://bucket/model").out == "memory://bucket/model\n"
    assert sorted(fsspec.filesystem("memory").find("/bucket/model")) == [
        f"/bucket/model/{name}" for name in FOLDER
    ]


def test_a_folder_in_a_bucket(searched, bucket):
    """Through s3fs, over the wire."""
    keep(searched.trials, 3)
    url = f"s3://{bucket.name}/models/digits"
    assert command("export", "digits", url).out == f"{url}\n"
    stored = bucket.objects()
    assert sorted(stored) == [f"models/digits/{name}" for name in FOLDER]
    assert json.loads(stored["models/digits/config.json"])
    assert refused(command("export", "digits", url)) == (
        f"{url} exists already; choose another place or delete it"
    )


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("nowhere://bucket/model", "nowhere://bucket/model leads nowhere: "),
        ("gs://bucket/model", "gs://bucket/model: fsspec needs another package for gs://"),
    ],
)
def test_a_place_without_its_library_is_refused(searched, place, message):
    assert message in refused(command("export", "digits", place))


def test_a_confirmation_s_own_name_is_exported_too(confirmed, tmp_path):
    keep(Planned.open(confirmed.url, "digits.confirm").ledger, *range(4))
    folder = tmp_path / "model"
    assert command("export", "digits.confirm", folder).out == f"{folder}\n"
    _, metadata = load_denoiser(folder / "model.safetensors")
    assert metadata["fid"]["seeds"] == {"training": 1, "evaluation": 1}


def test_mistakes_on_the_command_line(searched, tmp_path):
    keep(searched.trials, 3)
    folder = tmp_path / "model"
    assert "no study 'nobody'" in refused(command("export", "nobody", folder))
    assert "--steps 4 is of a promotion's chain" in refused(
        command("export", "digits", folder, "--steps", "4")
    )
    assert not folder.exists()


@pytest.mark.slow
def test_trained_again_each_nfe_has_its_folder_and_other_budgets_lie_beside(confirmed, tmp_path):
    """The second command exports its own students, not those of the first."""
    arm, runs = confirmed_arm(confirmed), tmp_path / "runs/digits.promote"
    for kimg, nfes in ((5.0, [2, 3]), (20.0, [2])):
        planned = plan_retraining(confirmed, normalised(), arm, nfes=nfes, kimg=kimg, seeds=1)
        finish(planned, lambda arm, row: 9.0 - row.arm)
    keep(planned.ledger, 2, 5, 8)
    path = write(tmp_path, weights=NORMALISED)
    first = command(
        "promote",
        path,
        "--method",
        "sfd",
        "--seeds",
        "1",
        "--nfe",
        "2,3",
        "--kimg",
        "5",
        "--workers",
        "1",
    )
    assert first.status == 0, first.err
    assert [line for line in first.out.splitlines() if "odel folder" in line] == [
        f"model folder: {runs / 'model-nfe2-5kimg'}",
        f"model folder: {runs / 'model-nfe3-5kimg'}",
    ]
    second = command("promote", path, "--method", "sfd", "--seeds", "1", "--kimg", "20")
    assert f"model folder: {runs / 'model-nfe2-20kimg'}\n" in second.out
    for name, number in (("nfe2-5kimg", 2), ("nfe3-5kimg", 5), ("nfe2-20kimg", 8)):
        denoiser, _ = load_model(str(runs / f"model-{name}"))
        assert denoiser_sha256(denoiser) == denoiser_sha256(student(number))
    again = command("promote", path, "--method", "sfd", "--seeds", "1", "--kimg", "20")
    assert f"model folder, written before: {runs / 'model-nfe2-20kimg'}\n" in again.out
    given = command(
        *("promote", path, "--method", "sfd", "--seeds", "1", "--nfe", "2,3", "--kimg", "5"),
        *("--out", tmp_path / "model"),
    )
    assert given.status == 0, given.err
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["nfe-2", "nfe-3"]
