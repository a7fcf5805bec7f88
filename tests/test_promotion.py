"""Weights at work: what they become at another K, which rows they get, what is refused."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from search.analysis.promotion import (
    PLAIN_PD,
    confirmed_arm,
    given_arm,
    plan_progressive,
    plan_retraining,
    said_of_budget,
    said_of_weights,
)
from search.analysis.retraining import variants
from search.report.chain_report import by_steps, chain_chart, chain_table, fid_table
from search.worker.chain_engine import chain_weights

from bdense.diffusion.sampling import Sampler
from bdense.diffusion.solvers import DDIM
from bdense.diffusion.vp import CosineSchedule
from bdense.errors import InputError
from bdense.models.store import load_denoiser, save_denoiser
from search.errors import SpecChangedError
from search.report.render import picture
from search.report.report_files import write_planned_report
from search.run import launch
from search.storage.engine import runs_folder
from search.study.arms import PLAIN, UNIFORM, Arm, Planned, PlannedRow
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
    search,
    searched_valley,
)
from tests.small import small_teacher
from tests.studies import CHAIN, LEARNED, NORMALISED, changed, promotion, spec, write
from tests.test_confirmation import confirmation

PAPER = given_arm("1.386,-4.274")


@pytest.fixture
def made(tmp_path_factory) -> Path:
    """Where storages lie that are made once."""
    return tmp_path_factory.getbasetemp()


@pytest.fixture
def url(tmp_path, made, monkeypatch) -> str:
    """An empty storage, which the command uses."""
    monkeypatch.setenv("BDENSE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("BDENSE_STORAGE", f"sqlite:///{tmp_path / 'study.db'}")
    open_once(monkeypatch)
    # In this process, which has torch already.
    monkeypatch.setattr(launch, "check_apart", launch._check)
    return copy_storage(empty_storage(made), tmp_path / "study.db")


@pytest.fixture
def confirmed(url, tmp_path, made) -> Study:
    copy_storage(confirmed_valley(made), tmp_path / "study.db")
    return Study.open(url, "digits")


@pytest.fixture
def asked(monkeypatch, made, tmp_path) -> Path:
    """A folder to write files to, beside the one confirmed search that nothing is written to."""
    monkeypatch.setenv("BDENSE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("BDENSE_STORAGE", f"sqlite:///{confirmed_valley(made)}")
    open_once(monkeypatch)
    monkeypatch.setattr(launch, "check_apart", launch._check)
    return tmp_path


def planned_chain(url: str, arm: Arm = PAPER, seeds=(0, 1), of=None, **keys) -> Planned:
    return plan_progressive(url, promotion(**keys), arm, of=of, seeds=seeds)


def last_fid(arm: Arm, row: PlannedRow) -> float:
    """Plain 9, 10; uniform 8.5, 9.5; promoted 7, 8."""
    return {"pd": 9.0, "uniform": 8.5}.get(arm.params.get("method"), 7.0) + row.seed


def keep_students(planned: Planned) -> None:
    """Put a student where each row says that its last one lies."""
    sampler = Sampler(num_intervals=2, afs=False, schedule=CosineSchedule(), solver=DDIM())
    for trial in planned.ledger.study.trials:
        metadata = {"kind": "student", "sampler": sampler.describe()}
        path = runs_folder() / trial.user_attrs["student"]
        save_denoiser(path, small_teacher(), metadata)


def chain_file(folder: Path, **keys) -> Path:
    path = folder / "promotion.yaml"
    path.write_text(yaml.safe_dump(changed(CHAIN, **keys)))
    return path


# ---- weights ----


def test_the_paper_s_weights_are_taken_literally_at_another_k():
    """w_4/w_1 = 64 becomes w_2/w_1 = 4; rescaled to sum 1, whatever b is."""
    at_four, at_two = (chain_weights(PAPER, substeps) for substeps in (4, 2))
    assert float(at_four[-1] / at_four[0]) == pytest.approx(64, rel=1e-3)
    assert float(at_two[-1] / at_two[0]) == pytest.approx(4, rel=1e-3)
    assert at_two.tolist() == pytest.approx([0.2, 0.8], rel=1e-3)
    assert at_four.tolist() == pytest.approx([w / 85 for w in (1, 4, 16, 64)], rel=2e-3)
    other = chain_weights(given_arm("1.386,3"), 2)
    assert torch.allclose(other, at_two)
    for weights in (at_four, at_two, other):
        assert float(weights.sum()) == pytest.approx(1.0)


def test_the_baselines_weights():
    assert chain_weights(PLAIN_PD, 4).tolist() == [1.0]
    assert chain_weights(UNIFORM, 4).tolist() == [0.25] * 4


def test_what_is_said_of_them():
    assert said_of_weights(PAPER, 4, 2) == (
        "log w_k = 1.386 k - 4.274: w_4/w_1 = 63.94 at the search's K = 4 becomes w_2/w_1 = "
        "3.999 at K = 2, taken literally; rescaled to sum 1: 0.2 0.8"
    )
    for searched_at in (None, 2):
        assert said_of_weights(PAPER, searched_at, 2) == (
            "log w_k = 1.386 k - 4.274: w_2/w_1 = 3.999 at K = 2; rescaled to sum 1: 0.2 0.8"
        )


@pytest.mark.parametrize(
    ("text", "a", "b"),
    [("1.386,-4.274", 1.386, -4.274), ("0.5", 0.5, 0.0), (" -1 , 2 ", -1.0, 2.0)],
)
def test_given_weights(text, a, b):
    arm = given_arm(text)
    assert (arm.params, arm.trial) == ({"a": a, "b": b}, None)
    assert not arm.is_baseline


@pytest.mark.parametrize("text", ["nonsense", "", "1,2,3", "1;2", "1,", ",1"])
def test_other_texts_are_no_weights(text):
    with pytest.raises(
        InputError, match=r"is no A,B of log w_k = a k .* --weights 1\.386,-4\.274"
    ):
        given_arm(text)


@pytest.mark.parametrize("text", ["nan,0", "1,inf", "1e400,0"])
def test_given_weights_are_finite(text):
    with pytest.raises(InputError, match=f"--weights {text} must be finite numbers"):
        given_arm(text)


@pytest.mark.parametrize("text", ["1000,0", "0,-1000", "-1000,0"])
def test_weights_without_a_sum_are_refused_before_anything_is_planned(url, text):
    """exp overflows, or leaves nothing."""
    with pytest.raises(InputError, match="have no positive, finite sum at K = 2; give others by"):
        planned_chain(url, given_arm(text))
    with pytest.raises(InputError, match="no study 'promote-digits'"):
        Planned.open(url, "promote-digits")


def test_steep_weights_that_have_a_sum_are_told(url):
    """w_2/w_1 alone is beyond float64."""
    steep = given_arm("800,-1600")
    planned_chain(url, steep)
    assert said_of_weights(steep, 4, 2).endswith(
        "w_2/w_1 = inf at K = 2, taken literally; rescaled to sum 1: 0 1"
    )


def test_learned_weights_are_refused_for_progressive_distillation(url):
    learned = Arm(name="uncertainty", params={"rule": "uncertainty", "strength": 1.0}, trial=3)
    with pytest.raises(InputError) as error:
        planned_chain(url, learned)
    assert str(error.value) == (
        "the weights of uncertainty are learned while training, which progressive distillation "
        "does not do; give fixed ones by --weights A,B"
    )


# ---- rows of a chain ----


def test_plain_uniform_and_the_weights_under_each_seed(url):
    planned = planned_chain(url)
    assert planned.arms == [PLAIN_PD, UNIFORM, PAPER]
    assert planned.unfinished() == [PlannedRow(arm=a, seed=s) for s in (0, 1) for a in (0, 1, 2)]
    assert planned.facts == {"of": None, "a": 1.386, "b": -4.274}


def test_other_weights_under_the_same_name_are_refused(url, tmp_path):
    finish(planned_chain(url), last_fid, most=1)
    with pytest.raises(SpecChangedError, match=r"\(a: 1.386 stored, 2.0 given\); restore the "):
        planned_chain(url, given_arm("2,-4.274"))
    assert Planned.open(url, "promote-digits").arms[2] == PAPER
    answer = command("promote", chain_file(tmp_path), "--weights", "2,-4.274")
    assert "(a: 1.386 stored, 2.0 given); restore the file, or give another" in refused(answer)
    assert planned_chain(url, given_arm("2,-4.274"), name="steeper").arms[2].params["a"] == 2.0


def test_other_conditions_under_the_same_name_are_refused(url):
    finish(planned_chain(url), last_fid, most=1)
    for keys, message in (
        ({"round__updates": 20}, r"\(round.updates: 10 stored, 20 given\)"),
        ({"weights_space": "state"}, r"\(weights_space: 'clean' stored, 'state' given\)"),
        ({"chain__last": 4}, r"\(chain.last: 2 stored, 4 given\)"),
    ):
        with pytest.raises(SpecChangedError, match=message):
            planned_chain(url, **keys)


def test_more_seeds_add_rows_and_fewer_take_none_away(url):
    finish(planned_chain(url), last_fid)
    more = planned_chain(url, seeds=(0, 1, 7))
    assert more.unfinished() == [PlannedRow(arm=arm, seed=7) for arm in range(3)]
    assert (more.left(), planned_chain(url, seeds=(0,)).left()) == (3, 3)


def test_before_a_row_has_begun_other_weights_replace_the_first(url):
    planned_chain(url)
    planned = planned_chain(url, given_arm("2,-4"), seeds=(0,))
    assert planned.arms[2].params == {"a": 2.0, "b": -4.0}
    assert planned.left() == 3


def test_the_result_over_the_steps(url):
    """Two seeds, 1 apart: the standard error is 0.5, and -2 against plain without any spread."""
    planned = planned_chain(url)
    finish(planned, last_fid)
    ours = by_steps(planned)[2].results[2]
    assert (ours.fids, ours.summary().standard_error) == ({0: 7.0, 1: 8.0}, pytest.approx(0.5))
    header, teacher, *rows, conditions = chain_table(planned).splitlines()
    assert header.split() == ["steps", "mean", "s.e.", "seeds", "vs", "plain", "vs", "uniform"]
    assert teacher.split() == ["8", "teacher", "3.000", "-", "-", "-", "-"]
    assert [row.split()[0] for row in rows] == ["4", "4", "4", "2", "2", "2"]
    assert rows[-1].endswith("-21.1 %, -2.00 [-2.00, -2.00]  -16.7 %, -1.50 [-1.50, -1.50]")
    assert "a 1.386 (given)  7.500  0.500      2" in rows[-1]
    assert conditions.startswith("FID: 256 images, features of digits-classifier, against digits")
    table = fid_table(planned)
    assert [(row["steps"], row["arm"], row["fid"]) for row in table] == [
        (8, "teacher", 3.0),
        (4, "plain PD", 8.5),
        (4, "uniform weights", 8.0),
        (4, "a 1.386 (given)", 6.5),
        (2, "plain PD", 9.5),
        (2, "uniform weights", 9.0),
        (2, "a 1.386 (given)", 7.5),
    ]
    assert (table[1]["std_err"], table[1]["n"]) == (pytest.approx(0.5), 2)
    assert (table[1]["training_seeds"], table[1]["evaluation_seed"]) == ("0 1", 0)


def test_the_figure_has_a_line_for_each_arm_and_the_teacher(url):
    planned = planned_chain(url)
    finish(planned, last_fid)
    (axes,) = picture(chain_chart(planned)).axes
    bars = {bar.get_label(): bar[0].get_xydata().tolist() for bar in axes.containers}
    assert bars == {
        "plain PD": [[4, 8.5], [2, 9.5]],
        "uniform weights": [[4, 8.0], [2, 9.0]],
        "B-DENSE, a 1.386 (given)": [[4, 6.5], [2, 7.5]],
    }
    teacher = next(line for line in axes.get_lines() if line.get_label() == "teacher")
    assert teacher.get_xydata().tolist() == [[8, 3.0]]


def test_the_report_of_a_chain(url, tmp_path):
    planned = planned_chain(url, seeds=(0,))
    with pytest.raises(InputError, match=r"0 of 3 rows complete, .* nothing to report yet"):
        write_planned_report(planned, tmp_path / "shown")
    finish(planned, last_fid)
    row = tmp_path / "runs/promote-digits/00002"
    row.mkdir(parents=True)
    for steps in (2, 4):
        (row / f"{steps:05d}-samples.png").write_bytes(b"at %d steps" % steps)
    text = write_planned_report(planned, tmp_path / "shown").read_text()
    assert chain_table(planned) in text
    assert "![promote-digits](fid.png)" in text
    assert (tmp_path / "shown/fid.png").stat().st_size > 1000
    assert "![a 1.386 (given), seed 0](samples-2.png)" in text
    assert (tmp_path / "shown/samples-2.png").read_bytes() == b"at 2 steps"


def test_a_chain_whose_spec_is_another_versions_is_not_reported(url, tmp_path):
    planned = planned_chain(url)
    finish(planned, last_fid)
    stored = json.loads(planned.spec_json) | {"wings": 2}
    planned.ledger.study.set_user_attr("spec", json.dumps(stored))
    told = refused(command("report", "promote-digits", "--out", tmp_path / "shown"))
    assert told.startswith("this bdense cannot read the study's spec (promote-digits: wings: ")


# ---- rows of SFD trained again ----


def test_sfd_trained_again_is_a_row_for_each_arm_seed_and_nfe(confirmed):
    """Under seeds that neither the search has seen nor the confirmation, which chose by 1 to 3."""
    study = normalised()
    arm = confirmed_arm(confirmed)
    planned = plan_retraining(confirmed, study, arm, nfes=[2, 3], kimg=20, seeds=2)
    assert planned.name == "digits.promote"
    assert planned.arms == [PLAIN, UNIFORM, arm]
    assert planned.unfinished() == [
        PlannedRow(arm=index, seed=seed, kimg=20.0, nfe=nfe)
        for nfe in (2, 3)
        for seed in (4, 5)
        for index in range(3)
    ]
    made = [(s.student.nfe, s.seeds.training, s.budget.kimg) for s in variants(planned, study)]
    assert made == [(2, 4, 20.0), (2, 5, 20.0), (3, 4, 20.0), (3, 5, 20.0)]


def test_other_weights_trained_again_are_one_more_arm_beside_the_same_baselines(confirmed):
    study, first = normalised(), confirmed_arm(confirmed)
    planned = plan_retraining(confirmed, study, first, nfes=[2], kimg=20, seeds=1)
    finish(planned, last_fid)
    more = plan_retraining(confirmed, study, PAPER, nfes=[2], kimg=20, seeds=1)
    assert more.arms == [PLAIN, UNIFORM, first, PAPER]
    assert more.unfinished() == [PlannedRow(arm=3, seed=4, kimg=20.0, nfe=2)]


def test_weights_that_were_confirmed_at_another_budget_are_told(confirmed):
    assert said_of_budget(confirmed, 2.56) == ""
    assert said_of_budget(confirmed, 20.0) == (
        "these weights were confirmed at 2.56 kimg and are used at 20: the best ones move with "
        "the budget; confirm them there by --kimg 20\n"
    )


def test_learned_weights_may_be_promoted_by_sfd(url):
    learned = spec(weights=LEARNED)
    study = search(url, [({"rule": "uncertainty", "strength": 0.5}, 9.0)], study=learned)
    finish(confirmation(study, learned, count=1), lambda arm, row: 10.0 - row.arm)
    arm = confirmed_arm(study)
    planned = plan_retraining(study, learned, arm, nfes=[2], kimg=20, seeds=1)
    assert planned.arms[2].params == {"rule": "uncertainty", "strength": 0.5, "memory": 100}


# ---- on the command line ----


def promote(folder: Path, *arguments: object, **keys):
    return command("promote", "digits", "--to", chain_file(folder, **keys), *arguments)


def test_what_the_weights_become_is_said_of_a_confirmed_winner(
    confirmed, url, tmp_path, monkeypatch
):
    planned = planned_chain(url, confirmed_arm(confirmed), seeds=(0,), of="digits")
    finish(planned, last_fid)
    monkeypatch.setattr("search.export.export_trial", lambda _, folder, **__: [folder])
    answer = promote(tmp_path, "--seeds", "1")
    assert answer.status == 0, answer.err
    assert answer.err == "promote-digits is complete; nothing is left to do\n"
    model = tmp_path / "runs/promote-digits/model"
    said, headline, *table, written, hint = answer.out.splitlines()
    # exp(3 x 0.75) and exp(0.75).
    assert said.startswith("log w_k = 0.75 k - 2.202: ")
    assert "w_4/w_1 = 9.488 at the search's K = 4 becomes w_2/w_1 = 2.117 at K = 2" in said
    assert headline == "promote-digits: 3 of 3 rows complete, 0 pruned, 0 failed, 0 running"
    assert "\n".join(table) == chain_table(planned)
    assert written == f"model folder: {model}"
    assert hint == f"draw images with it:   bdense sample {model} --out samples.png"


def test_a_model_folder_is_written_once_and_anew_when_rows_have_come(url, tmp_path):
    """What was handed on before keeps its files, under another name."""
    arguments = ("promote", chain_file(tmp_path), "--weights", "1.386,-4.274", "--seeds")
    planned = planned_chain(url, seeds=(0,))
    finish(planned, last_fid)
    keep_students(planned)
    model = tmp_path / "runs/promote-digits/model"
    assert f"model folder: {model}\n" in command(*arguments, "1").out
    written = {path.name: path.stat().st_mtime_ns for path in model.iterdir()}
    assert f"model folder, written before: {model}\n" in command(*arguments, "1").out
    assert {path.name: path.stat().st_mtime_ns for path in model.iterdir()} == written

    finish(planned_chain(url, seeds=(0, 1)), last_fid)
    keep_students(planned)
    more = command(*arguments, "2")
    assert f"model folder: {model}\n" in more.out
    assert f"the model of fewer rows is now {model}.1\n" in more.err
    assert {path.name: path.stat().st_mtime_ns for path in Path(f"{model}.1").iterdir()} == written
    tables = [
        load_denoiser(folder / "model.safetensors")[1]["fid_table"][-1]
        for folder in (Path(f"{model}.1"), model)
    ]
    assert [(row["n"], row["fid"]) for row in tables] == [(1, 7.0), (2, 7.5)]


def test_a_promotion_s_file_names_its_study(asked):
    """Refused as the study's command would be: there is a model where --out says."""
    (asked / "model").mkdir()
    path = chain_file(asked, study="digits")
    assert refused(command("promote", path, "--out", asked / "model")) == (
        f"{asked / 'model'} exists already; choose another folder or delete it"
    )


def test_a_dry_run_plans_nothing(asked, made, monkeypatch):
    """What it costs is measured elsewhere."""
    monkeypatch.setattr("search.worker.cost.cost_lines", lambda *_, **__: ["what it costs"])
    answer = promote(asked, "--dry-run", "--seeds", "4,5", "--weights-space", "state")
    assert answer.status == 0, answer.err
    told = yaml.safe_load(answer.out)
    assert (told["seeds"]["training"], told["weights_space"]) == ([4, 5], "state")
    fingerprint = promotion(weights_space="state").fingerprint()
    assert answer.out.endswith(f"# fingerprint {fingerprint}\n# what it costs\n")
    with pytest.raises(InputError, match="no study 'promote-digits'"):
        Planned.open(f"sqlite:///{confirmed_valley(made)}", "promote-digits")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--weights", "nonsense"), "--weights nonsense is no A,B of log w_k = a k + b; give two"),
        (("--weights", ""), "--weights  is no A,B of log w_k"),
        (("--weights", "1000,0"), "the weights of a 1000.000 (given), log w_k = 1000 k + 0, have"),
        (("--nfe", "2"), "--method pd has no --nfe; drop that"),
        (("--kimg", "2", "--nfe", "2"), "--method pd has no --nfe and no --kimg; drop that"),
        (("--out", "."), ". exists already; choose another folder or delete it"),
        (("--seeds", "0,0"), "with these options: seeds.training: [0, 0] must name one seed or"),
        (("--seeds=-1,0",), "with these options: seeds.training: Input should be greater than"),
        (("--seeds", "0"), "with these options: seeds.training: [] must name one seed or more"),
        (("--name", "No Name"), "with these options: name: String should match pattern"),
        (("--name", ""), "with these options: name: String should match pattern"),
        (("--name", "digits"), "study 'digits' is a search, not a list of planned rows"),
    ],
)
def test_mistakes_in_a_promotion_s_options(asked, options, message):
    assert message in refused(promote(asked, *options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--name", "x"), "--method sfd has no --name; drop that"),
        (("--to", "absent.yaml", "-n"), "--method sfd has no --to and no --dry-run; drop that"),
        (("--weights-space", "state"), "--method sfd has no --weights-space; drop that"),
        (("--seeds", "0,1"), "--seeds 0,1: with --method sfd it is how many fresh ones; give one"),
        (("--seeds", "0"), "--seeds 0: with --method sfd it is how many fresh ones; give one nu"),
        (("--weights", "x"), "--weights x is no A,B"),
    ],
)
def test_mistakes_in_the_options_of_training_again(asked, options, message):
    assert message in refused(command("promote", "digits", "--method", "sfd", *options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--nfe", "0"), "argument --nfe: must be 1 or more, got 0"),
        (("--nfe", "2,x"), "argument --nfe: invalid positives value: '2,x'"),
        (("--kimg", "0.0001"), "argument --kimg: must lie in 0.001..1e9, got 0.0001"),
    ],
)
def test_numbers_out_of_range_are_refused(asked, options, message):
    """A row beyond its distribution's bounds would be given a value by chance."""
    answer = command("promote", "digits", "--method", "sfd", *options)
    assert answer.status == 2
    assert message in answer.err


def test_a_chain_that_does_not_divide_is_refused(asked):
    assert refused(promote(asked, chain__last=3)) == (
        "promotion promote-digits: 8 steps do not become 3 by dividing by K=2 again and again; "
        "end at 4 or 2, or start at 6"
    )


def test_a_search_s_file_is_no_promotion(asked):
    path = write(asked, weights=NORMALISED)
    expected = "a teacher and a chain of steps, which a promotion file gives: add --to PROMOTION"
    assert expected in refused(command("promote", path))
    assert expected in refused(command("promote", "digits"))
    given = refused(command("promote", "digits", "--to", path))
    assert "is a study, not a promotion: it has a student and no chain" in given
    chain = chain_file(asked)
    assert "are promotions; drop one" in refused(command("promote", chain, "--to", chain))
    assert "is a promotion, not a study: it has a chain" in refused(command("launch", chain))
    assert "no study says which weights to promote" in refused(command("promote", chain))


def test_a_study_s_file_that_has_changed_since_is_refused(asked):
    study = write(asked, weights=NORMALISED, budget__lr=1e-3)
    answer = command("promote", study, "--to", chain_file(asked))
    assert "(budget.lr: 0.0005 stored, 0.001 given); rename the study or" in refused(answer)


def test_a_search_without_a_complete_trial_is_refused(url, tmp_path):
    search(url, [])
    assert "no trial of study digits is complete, so there is nothing" in refused(
        promote(tmp_path)
    )


def test_a_search_without_a_confirmed_winner_is_refused(url, tmp_path, made):
    copy_storage(searched_valley(made), tmp_path / "study.db")
    assert "only a best of n (a 1.250) that may have been lucky; run" in refused(promote(tmp_path))
    assert "only a best of n" in refused(command("promote", "digits", "--method", "sfd"))
    planned = confirmation(Study.open(url, "digits"), count=1)
    assert "has no confirmed winner, only a best of n" in refused(promote(tmp_path))
    finish(planned, lambda arm, row: 10.0 - row.arm, most=3)
    assert "the confirmation of study digits has not ended" in refused(promote(tmp_path))


def test_learned_winners_are_refused_on_the_command_line_too(url, tmp_path):
    learned = spec(weights=LEARNED)
    study = search(url, [({"rule": "uncertainty", "strength": 0.5}, 9.0)], study=learned)
    finish(confirmation(study, learned, count=1), lambda arm, row: 10.0 - row.arm)
    assert "are learned while training, which progressive" in refused(promote(tmp_path))
