"""Model folders of a study's rows: whose student, with which figures, and what is refused."""

import json
import re
from pathlib import Path
from typing import Any

import fsspec
import pytest

from bdense.errors import InputError
from bdense.models.store import denoiser_sha256, load_denoiser, load_model, save_denoiser
from search import open_study
from search.analysis.plans import plan_confirmation, plan_given
from search.export import arm_row, export_trial
from search.places import runs_folder
from search.study.folders import grid_name
from search.study.study import Study
from tests.disks import names
from tests.measured import command, finish, normalised, plan_transfer, refused, search
from tests.students import METADATA, digest, keep, shade, student
from tests.studies import of_kind, promotion, spec

FOLDER = ["README.md", "config.json", "model.safetensors", "samples.png"]
PAPER = {"a": 1.386, "b": -4.274}
NAME = "a 1.386, b -4.274 (given)"


def exported(study: Study, folder: Path, **asked: Any) -> dict[str, Any]:
    """The metadata of the folder that is written, and whose student it holds."""
    assert export_trial(study, folder, **asked).paths == [folder]
    denoiser, metadata = load_model(str(folder))
    return metadata | {"weights_sha256": denoiser_sha256(denoiser)}


def whose(folder: Path) -> str:
    return denoiser_sha256(load_model(str(folder))[0])


def fid(arm, row) -> float:
    """Plain 9, 10; uniform 8.5, 9.5; the others 7, 8."""
    return {"plain": 9.0, "uniform": 8.5, None: 7.0}[arm.baseline] + row.seed


# ---- whose student ----


def test_without_a_confirmation_it_is_the_best_trial_s(searched, tmp_path):
    keep(searched, 2, 3)
    assert exported(searched, tmp_path / "model")["weights_sha256"] == digest(3)
    assert names(tmp_path / "model") == FOLDER
    assert exported(searched, tmp_path / "other", number=2)["weights_sha256"] == digest(2)


def test_after_one_it_is_the_winner_s_under_the_first_fresh_seed(confirmed, tmp_path):
    """Trial 2, the second candidate: row 3 of the confirmation, which may be named itself."""
    confirmation = Study.open(confirmed.url, "digits.confirm")
    keep(confirmation)
    metadata = exported(confirmed, tmp_path / "model")
    assert metadata["weights_sha256"] == digest(3)
    assert metadata["fid"]["seeds"] == {"training": 1, "evaluation": 1}
    assert "identity" not in metadata
    assert command("export", "digits.confirm", tmp_path / "own").status == 0
    assert whose(tmp_path / "own") == digest(3)
    table = metadata["fid_table"]
    assert [(row["arm"], row["n"], row["fid"]) for row in table] == [
        ("plain SFD", 3, 12.25),
        ("uniform weights", 3, 11.25),
        ("a 1.250 (trial 3)", 3, 10.25),
        ("a 0.750 (trial 2)", 3, 9.25),
    ]
    assert (table[0]["nfe"], table[0]["training_seeds"]) == (2, "1 2 3")
    assert "a 1.250 (trial 3)" in (tmp_path / "model/README.md").read_text()
    # Another candidate's pictures are its own and the baselines'.
    assert exported(confirmation, tmp_path / "x", number=6)["weights_sha256"] == digest(6)
    assert shade(tmp_path / "x/samples-promoted.png") == 62
    assert shade(tmp_path / "x/samples-plain.png") == 42


def test_of_a_confirmation_that_has_not_ended_it_is_the_best_trial_s(searched, tmp_path):
    planned = plan_confirmation(searched, method={}, seeds=3, count=2)
    finish(planned, fid, most=5)
    keep(searched, 3)
    assert exported(searched, tmp_path / "model")["weights_sha256"] == digest(3)


def test_of_given_arms_it_is_the_recommended_one_s(confirmed, tmp_path):
    """Two arms of one mean: neither beats the first of them, and both beat the baselines."""
    study = plan_transfer(confirmed, normalised(name="others"), top=2, seeds=1)
    finish(study, fid)
    keep(study, 2)
    assert exported(study, tmp_path / "model")["weights_sha256"] == digest(2)


def test_a_baseline_s_student_may_be_asked_for(confirmed, tmp_path):
    keep(confirmed, ledger=confirmed.given)
    folder = tmp_path / "uniform"
    answer = command("export", "digits", folder, "--baseline", "uniform")
    assert answer.out == f"{folder}\n"
    assert "study digits, baseline, uniform weights, seed 0: FID 11.000" in answer.err
    assert whose(folder) == digest(1)
    assert open_study("digits").export(tmp_path / "plain", baseline="plain").paths
    assert whose(tmp_path / "plain") == digest(0)
    both = command("export", "digits", tmp_path / "both", "--baseline", "plain", "--trial", "1")
    assert "--baseline plain and --trial 1 are two" in refused(both)
    with pytest.raises(InputError, match="baseline plain is for a search"):
        export_trial(Study.open(confirmed.url, "digits.confirm"), folder, baseline="plain")


# ---- of a method of several stages ----


@pytest.fixture
def chain(url) -> Study:
    """8 -> 4 -> 2 steps under three seeds; every row has its students and their pictures."""
    arms, seeds = ["plain", "uniform", PAPER], [0, 1, 2]
    study = plan_given(url, promotion(plan__arms=arms, plan__seeds=seeds))
    finish(study, fid)
    keep(study)
    return study


def test_the_last_student_comes_with_all_stages_figures_and_each_arm_s_picture(chain, tmp_path):
    folder = tmp_path / "model"
    metadata = exported(chain, folder)
    assert metadata["weights_sha256"] == digest(2)  # seed 0, at 2 steps
    assert metadata["fid"]["value"] == 7.0
    assert [(row["nfe"], row["arm"], row["fid"]) for row in metadata["fid_table"]] == [
        (8, "teacher", 3.0),
        (4, "plain PD", 9.0),
        (4, "uniform weights", 8.5),
        (4, NAME, 7.0),
        (2, "plain PD", 10.0),
        (2, "uniform weights", 9.5),
        (2, NAME, 8.0),
    ]
    plain = metadata["fid_table"][1]
    assert (plain["std_err"], plain["n"]) == (pytest.approx(3**-0.5), 3)
    pictures = ["fid.png", "samples-plain.png", "samples-promoted.png", "samples-uniform.png"]
    assert names(folder) == sorted([*FOLDER, *pictures])
    assert [shade(folder / name) for name in pictures[1:]] == [2, 22, 12]
    card = (folder / "README.md").read_text()
    assert all(f"]({name})" in card for name in pictures)


def test_an_earlier_stage_and_another_row_may_be_asked_for(chain, tmp_path):
    early = exported(chain, tmp_path / "early", nfe=4)
    assert early["weights_sha256"] == digest(2, 4)
    assert (early["fid"]["value"], early["fid"]["nfe"]) == (6.0, 4)
    assert shade(tmp_path / "early/samples-promoted.png") == 24
    plain = exported(chain, tmp_path / "plain", number=3)
    assert plain["weights_sha256"] == digest(3)
    assert shade(tmp_path / "plain/samples-uniform.png") == 42


def test_a_search_of_several_stages_hands_on_its_best_trial_s(url, tmp_path):
    study = search(url, [({"a": 1.0}, 9.0)], study=spec(of_kind("progressive", "search")))
    keep(study)
    assert exported(study, tmp_path / "model")["weights_sha256"] == digest(0)
    assert exported(study, tmp_path / "early", nfe=4)["weights_sha256"] == digest(0, 4)


def test_a_diffusers_network_is_also_written_as_a_pipeline(url, tmp_path, capsys):
    pytest.importorskip("diffusers", reason="needs the diffusers extra")
    from tests.test_diffusers_export import metadata_of, own, student_of

    study = plan_given(url, promotion(plan={"arms": ["plain", "uniform", PAPER], "seeds": [0]}))
    finish(study, fid)
    denoiser = student_of(tmp_path / "teacher", prediction_type="v_prediction")
    last = runs_folder() / study.given.study.trials[2].user_attrs["student"]
    save_denoiser(last, denoiser, metadata_of(own(denoiser)))
    folder = tmp_path / "model"
    assert export_trial(study, folder).paths == [folder, folder / "diffusers"]
    assert (folder / "diffusers/model_index.json").exists()
    # What diffusers cannot draw is told, and the folder is there all the same.
    save_denoiser(last, denoiser, metadata_of(own(denoiser, 7)))
    assert export_trial(study, tmp_path / "other").paths == [tmp_path / "other"]
    assert "no diffusers pipeline is written: " in capsys.readouterr().err


# ---- what is refused ----


def test_the_grid_of_a_student_of_latents_must_be_there(searched, tmp_path):
    """Its card shows it, and the autoencoder that draws it is the teacher's."""
    keep(searched, 3)
    last = runs_folder() / searched.search.study.trials[3].user_attrs["student"]
    save_denoiser(last, student(3), METADATA | {"codec": {"image_channels": 3, "enlarges": 8}})
    grid = last.with_name(grid_name(""))
    grid.unlink()
    with pytest.raises(InputError, match=f"{grid}, is missing.*: bdense sample {last} .*{grid}"):
        exported(searched, tmp_path / "model", number=3)


def test_what_there_is_not_is_refused(searched, chain, tmp_path):
    keep(searched, 3)

    def message(study: Study, **asked: Any) -> str:
        with pytest.raises(InputError) as error:
            exported(study, tmp_path / "model", **asked)
        assert not (tmp_path / "model").exists()
        return str(error.value)

    assert "trial 9 of digits is not complete" in message(searched, number=9)
    gone = message(searched, number=0)
    assert f"{tmp_path / 'runs/digits/00000/student.safetensors'} is gone" in gone
    assert gone.endswith("kept are those of 3")
    assert "nfe 4" in message(searched, nfe=4)
    assert "one of 4, 2 " in message(chain, nfe=8)


def test_of_rows_that_have_not_come_so_far_nothing_is_exported(url, tmp_path):
    study = plan_given(url, promotion(plan={"arms": ["plain", "uniform", PAPER], "seeds": [0]}))
    with pytest.raises(InputError, match="no row of promote-digits is complete"):
        exported(study, tmp_path / "model")
    finish(study, fid, most=2)
    weights = study.arms[2].name
    with pytest.raises(InputError, match=f"no row of {re.escape(weights)} is complete"):
        arm_row(study, arm=weights)


# ---- on the command line ----


def test_a_folder_is_written_and_named_once(searched, tmp_path):
    keep(searched, 3)
    folder = tmp_path / "model"
    answer = command("export", "digits", folder)
    assert answer.out == f"{folder}\n"
    assert "study digits, trial 3, a 1.250: FID 9.02" in answer.err
    assert json.loads((folder / "config.json").read_text())
    told = refused(command("export", "digits", folder))
    assert f"{folder} exists already" in told


def test_a_folder_may_lie_wherever_fsspec_leads(searched, tmp_path):
    keep(searched, 3)
    url = f"file://{tmp_path}/bucket/model"
    assert command("export", "digits", url).out == f"{url}\n"
    assert names(tmp_path / "bucket/model") == FOLDER
    assert whose(tmp_path / "bucket/model") == digest(3)
    assert f"{url} exists already" in refused(command("export", "digits", url))
    assert command("export", "digits", "memory://bucket/model").out == "memory://bucket/model\n"
    assert sorted(fsspec.filesystem("memory").find("/bucket/model")) == [
        f"/bucket/model/{name}" for name in FOLDER
    ]


def test_a_folder_in_a_bucket(searched, bucket, tmp_path):
    """Through s3fs, over the wire."""
    keep(searched, 3)
    url = f"s3://{bucket.name}/models/digits"
    assert command("export", "digits", url).out == f"{url}\n"
    stored = bucket.objects()
    assert sorted(stored) == [f"models/digits/{name}" for name in FOLDER]
    (tmp_path / "model.safetensors").write_bytes(stored["models/digits/model.safetensors"])
    assert denoiser_sha256(load_denoiser(tmp_path / "model.safetensors")[0]) == digest(3)


@pytest.mark.parametrize("place", ["nowhere://bucket/model", "gs://bucket/model"])
def test_a_place_without_its_library_is_refused(searched, place):
    assert refused(command("export", "digits", place)).startswith(place)
