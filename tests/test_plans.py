"""Arms taken from a search, confirmed, promoted, transferred: four ways to one kind of study."""

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from bdense.errors import InputError
from bdense.models.store import denoiser_sha256, load_denoiser, load_model
from search import open_study
from search.analysis.comparison import comparison_rows, comparisons_of, teacher_of
from search.analysis.confirmation import confirmed_arm
from search.analysis.plans import (
    arm_from,
    at_another_k,
    other_budget,
    plan_confirmation,
    plan_given,
)
from search.errors import SpecChangedError
from search.promotion import Asked, Promotion
from search.spec.file import read_spec
from search.study.arms import Arm, ArmRow, arms_study
from search.study.study import Study
from search.study.wording import align
from search.worker.assets import load, use_device
from search.worker.worker import Worker
from tests.measured import (
    command,
    finish,
    normalised,
    plan_promotion,
    plan_transfer,
    refused,
    search,
)
from tests.rows import run
from tests.students import digest, keep
from tests.studies import LEARNED, NORMALISED, PROMOTION, changed, promotion, spec, write

PAPER = arm_from("1.386,-4.274")
# Another NFE, K, budget and seed.
OTHERS: dict[str, Any] = {
    "name": "others",
    "weights": NORMALISED,
    "seeds": {"training": 1},
    "method__nfe": 3,
    "method__substeps": 2,
    "method__kimg": 5.0,
}


@dataclass(frozen=True)
class Way:
    """One way from a search (fixture ``of``) to a study of given arms.

    ``trials`` are the search's whose weights are arms, ``verb`` makes the study on the command
    line from the file of ``tree``, and ``change`` is a setting that forbids a comparison.
    """

    name: str
    make: Callable[..., Study]
    trials: Sequence[int]
    seeds: Sequence[int]
    verb: Sequence[str]
    change: dict[str, Any] | None = None
    tree: dict[str, Any] | None = None
    variants: Sequence[dict[str, Any]] = ({},)
    latents: int | None = None
    of: str = "confirmed"

    def planned(self, study: Study, more: int = 0, **keys: Any) -> Study:
        """The study with so many seeds more, or less."""
        return self.make(study, len(self.seeds) + more, **keys)

    def command(self, folder: Path) -> list[str]:
        file = write(folder, self.tree) if self.tree is not None else ""
        return [part.format(file=file) for part in self.verb]


def confirm(study: Study, count: int) -> Study:
    return plan_confirmation(study, method={}, seeds=count, count=2)


def promote(study: Study, count: int, **keys: Any) -> Study:
    of = arms_study(normalised(**keys), "digits.promote")
    return plan_promotion(
        study.url,
        of,
        confirmed_arm(study),
        seeds=range(4, 4 + count),
        variants=({}, {"nfe": 3}),
    )


def promote_to(study: Study, count: int = 2, **keys: Any) -> Study:
    arm = confirmed_arm(study)
    return plan_promotion(study.url, promotion(**keys), arm, seeds=range(count))


def transfer(study: Study, count: int, **keys: Any) -> Study:
    return plan_transfer(study, spec(**{**OTHERS, **keys}), top=2, seeds=count)


WAYS = [
    Way(
        "digits.confirm",
        confirm,
        of="searched",
        trials=(3, 2),
        seeds=(1, 2, 3),
        verb=("confirm", "digits", "--candidates", "2"),
    ),
    Way(
        "digits.promote",
        promote,
        trials=(2,),
        seeds=(4, 5),  # 0 is the search's, 1 to 3 chose the winner
        variants=({}, {"nfe": 3}),
        change={"method__lr": 1e-3},
        verb=("promote", "digits", "--nfe", "2,3", "--seeds", "2"),
    ),
    Way(
        "promote-digits",
        promote_to,
        trials=(2,),
        seeds=(0, 1),
        latents=0,
        change={"method__updates": 20},
        verb=("promote", "digits", "--to", "{file}"),
        tree=PROMOTION,
    ),
    Way(
        "others.from.digits",
        transfer,
        trials=(3, 2),
        seeds=(2, 3),  # 0 and 1 are the other study's own
        change={"method__kimg": 6.0},
        verb=("transfer", "digits", "--to", "{file}", "--top", "2", "--seeds", "2"),
        tree=changed(**OTHERS),
    ),
]
each_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)


@pytest.fixture
def source(request, way) -> Study:
    """The search."""
    return request.getfixturevalue(way.of)


def fid(arm: Arm, row: ArmRow) -> float:
    """Plain 9, 10 ..; uniform 8.5, 9.5 ..; the weights 7, 8 .."""
    return {"plain": 9.0, "uniform": 8.5, None: 7.0}[arm.baseline] + row.seed


def left(study: Study) -> list[ArmRow]:
    return [row for row, ended in study.rows() if not ended]


# ---- whichever way ----


@each_way
def test_the_weights_and_both_baselines_are_trained_under_each_seed(source, way):
    study = way.planned(source)
    assert (study.name, study.of, study.is_search) == (way.name, "digits", False)
    assert [arm.baseline for arm in study.arms[:2]] == ["plain", "uniform"]
    assert [arm.trial for arm in study.arms[2:]] == list(way.trials)
    # Taken literally: (a, b) whose sum was the search's K have another one elsewhere.
    trials = source.search.study.trials
    stored = [trials[number].user_attrs for number in way.trials]
    assert [arm.params for arm in study.arms[2:]] == [{"a": s["a"], "b": s["b"]} for s in stored]
    rows = [
        ArmRow(arm=arm, seed=seed, variant=variant)
        for variant in range(len(way.variants))
        for seed in way.seeds
        for arm in range(len(study.arms))
    ]
    assert left(study) == rows
    for row in rows:
        task = study.task(study.given, asdict(row))
        assert task.params == study.arms[row.arm].params
        assert task.variant == way.variants[row.variant]
        assert (task.seed, task.latents) == (row.seed, row.seed if way.latents is None else 0)


@each_way
def test_asked_again_only_what_is_new_is_added(source, way):
    done = finish(way.planned(source), fid)
    assert way.planned(source).left() == 0
    more = left(way.planned(source, +1))
    assert {row.seed for row in more} == {max(way.seeds) + 1}
    assert len(more) == len(done) / len(way.seeds)
    # Fewer take nothing away.
    assert left(way.planned(source, -1)) == more


@pytest.mark.parametrize("way", WAYS[1:], ids=lambda way: way.name)
def test_other_conditions_are_refused_once_a_row_has_begun_and_replaced_before(source, way):
    rows = way.planned(source).left()
    other = way.planned(source, **way.change)
    assert other.left() == rows
    finish(other, fid, most=1)
    (key,) = way.change
    with pytest.raises(SpecChangedError, match=rf"\({key.replace('__', '.')}: .* stored, "):
        way.planned(source)


@each_way
def test_the_verb_runs_all_rows_and_tells_the_result_and_again_starts_nothing(
    source, way, tmp_path, monkeypatch
):
    """Rows are trained elsewhere."""

    def run(study: Study, *_: object, **__: object) -> None:
        finish(study, fid)
        keep(study)

    monkeypatch.setattr("search.run.launch.run", run)
    first, again = (command(*way.command(tmp_path)) for _ in range(2))
    study = source.sibling(way.name)
    rows = len(study.rows())
    assert rows == len(way.variants) * len(way.seeds) * (2 + len(way.trials))
    told = align(comparison_rows(comparisons_of(study), teacher_of(study)))
    for answer in (first, again):
        assert answer.status == 0, answer.err
        assert f"{way.name}: {rows} of {rows} rows complete" in answer.out
        assert all(line in answer.out for line in told)
        assert "-2.00 [" in answer.out
    nothing = f"{way.name} is complete; nothing is left to do\n"
    assert [nothing in answer.err for answer in (first, again)] == [False, True]


# ---- weights at work ----


def test_what_the_same_weights_are_at_another_k():
    told = at_another_k(PAPER, 4, 2)
    assert "log w_k = 1.386 k - 4.274" in told
    assert "w_4/w_1 = 63.94 at K = 4" in told
    assert "w_2/w_1 = 3.999 at K = 2" in told
    assert told.endswith("in shares 0.2 0.8")
    assert at_another_k(PAPER, 4, 4) == ""
    learned = Arm(name="x", params={"rule": "uncertainty", "strength": 1.0, "memory": 9})
    assert at_another_k(learned, 4, 2) == ""
    # w_2/w_1 alone is beyond float64.
    assert at_another_k(arm_from("800,-1600"), 4, 2).endswith("in shares 0 1")


@pytest.mark.parametrize(
    ("text", "a", "b"),
    [("1.386,-4.274", 1.386, -4.274), ("0.5", 0.5, 0.0), (" -1 , 2 ", -1.0, 2.0)],
)
def test_given_weights(text, a, b):
    arm = arm_from(text)
    assert (arm.params, arm.trial, arm.baseline) == ({"a": a, "b": b}, None, None)


@pytest.mark.parametrize("text", ["", "1,2,3", "1;2", "1,", "nan,0", "1,inf"])
def test_other_texts_are_no_weights(text):
    with pytest.raises(InputError, match=f"^weights .*{text}"):
        arm_from(text)


def test_other_weights_are_one_more_arm_beside_the_same_baselines(confirmed):
    finish(promote_to(confirmed, 1), fid)
    more = plan_promotion(confirmed.url, promotion(), PAPER, seeds=[0])
    assert [arm.trial for arm in more.arms[2:]] == [2, None]
    assert left(more) == [ArmRow(arm=3, seed=0)]


def test_weights_that_were_confirmed_at_another_budget_are_told(confirmed):
    assert other_budget(confirmed, {}) == other_budget(confirmed, {"kimg": 2.56}) == ""
    told = other_budget(confirmed, {"kimg": 20.0})
    assert "were confirmed at 2.56 kimg and are used at kimg 20.0" in told


def test_a_file_s_arms_may_be_a_winner_and_given_weights(confirmed):
    arms = ["plain", {"winner_of": "digits"}, {"a": 1.0, "b": -2.0}, {"a": 0.0}]
    of = promotion(plan={"arms": arms, "seeds": [7]})
    study = plan_given(confirmed.url, of)
    assert [arm.trial for arm in study.arms] == [None, 2, None, None]
    assert study.arms[2].params == {"a": 1.0, "b": -2.0}
    assert study.arms[3].params == {"a": 0.0, "b": 0.0}
    assert study.of == "digits"
    assert left(study) == [ArmRow(arm=arm, seed=7) for arm in range(4)]
    # Given on the command line they are the same arm.
    plan_promotion(confirmed.url, of, arm_from("1,-2"), seeds=[7])
    assert [arm.name for arm in study.arms[2:]] == [
        "a 1.000, b -2.000 (given)",
        "a 0.000, b 0.000 (given)",
        "uniform weights",
    ]


@pytest.mark.parametrize(
    "make",
    [
        lambda study, arm: plan_transfer(study, spec(**OTHERS), top=1, seeds=1),
        lambda study, arm: plan_promotion(study.url, promotion(), arm, search=None, seeds=[0]),
    ],
    ids=["transferred", "promoted to progressive"],
)
def test_learned_weights_go_anywhere_with_their_memory(url, make):
    learned = spec(weights=LEARNED | {"memory": 7})
    study = search(url, [({"rule": "uncertainty", "strength": 0.5}, 9.0)], study=learned)
    finish(plan_confirmation(study, method={}, seeds=3, count=1), fid)
    planned = make(study, confirmed_arm(study))
    params = {"rule": "uncertainty", "strength": 0.5, "memory": 7}
    assert planned.arms[2].params == params


def test_rows_train_as_their_variant_does(searched, tmp_path, monkeypatch, shared_cache):
    """Under the first fresh seed: the weights' FID is that without the ledger."""
    monkeypatch.setenv("BDENSE_CACHE", str(shared_cache))
    tiny = {"teacher__train__kimg": 0.128, "teacher__train__batch": 32, "method__batch": 32}
    tiny |= {"trajectories": {"mode": "live"}, "resources": {"gpus": 0}}
    to = spec(**{**OTHERS, **tiny, "method__kimg": 0.064, "evaluation__images": 64})
    study = plan_transfer(searched, to, top=1, seeds=1)
    worker = Worker(study)
    while (claimed := worker.claim()) is not None:
        worker.work(claimed)
    plain, uniform, ours = study.given.study.trials
    assert plain.user_attrs["weights"] == [1.0]
    assert uniform.user_attrs["weights"] == [1.0, 1.0]
    assert len(ours.user_attrs["weights"]) == 2
    assert ours.user_attrs["arm"] == "a 1.250 (trial 3)"
    assert ours.user_attrs["fid"]["nfe"] == 3
    assert ours.user_attrs["fid"]["seeds"] == {"training": 2, "evaluation": 2}
    assert (tmp_path / "runs" / ours.user_attrs["student"]).exists()
    task = study.task(study.given, asdict(ArmRow(arm=2, seed=2)))
    alone = run(load(to, use_device(to)), tmp_path / "alone/00000", task)
    assert (alone.value, alone.fid.as_dict()) == (ours.value, ours.user_attrs["fid"])


# ---- the verb promote ----


def test_a_model_is_written_once_and_anew_when_there_is_more(confirmed, tmp_path):
    """The figures in its card are those of all rows; the older one keeps its files elsewhere."""
    arguments = ("promote", "digits", "--to", write(tmp_path, PROMOTION), "--seeds")
    study = promote_to(confirmed, 1)
    finish(study, fid)
    keep(study, 2)
    model = tmp_path / "runs/promote-digits/model"
    assert f"model folder: {model}\n" in command(*arguments, "1").out
    assert denoiser_sha256(load_model(str(model))[0]) == digest(2)
    written = {path.name: path.stat().st_mtime_ns for path in model.iterdir()}
    assert f"model folder, written before: {model}\n" in command(*arguments, "1").out
    assert {path.name: path.stat().st_mtime_ns for path in model.iterdir()} == written

    finish(promote_to(confirmed, 3), fid)
    more = command(*arguments, "3")
    assert f"model folder: {model}\n" in more.out
    older = Path(f"{model}.1")
    assert {path.name: path.stat().st_mtime_ns for path in older.iterdir()} == written
    tables = [load_denoiser(f / "model.safetensors")[1]["fid_table"][-1] for f in (older, model)]
    assert [(row["n"], row["fid"]) for row in tables] == [(1, 7.0), (3, 8.0)]


def test_a_promotion_from_python_is_that_of_the_command(confirmed, tmp_path):
    study = promote_to(confirmed, 1)
    plan_promotion(confirmed.url, promotion(), PAPER, seeds=[0])
    finish(study, fid)
    keep(study, 2, 3)
    held, file = open_study("digits"), write(tmp_path, PROMOTION)
    (made,) = held.promote(to=file, seeds=1)
    winner = study.arms[2]
    assert made.is_new
    assert (made.model.study, made.model.number) == ("promote-digits", 2)
    assert made.model.label == f"row 2, {winner.name}, seed 0"
    assert made.model.fid.value == 7.0
    assert made.recommended.arm == winner
    assert denoiser_sha256(load_model(str(made.model.folder))[0]) == digest(2)
    (again,) = held.promote(to=file, seeds=[0])
    assert (again.is_new, again.model) == (False, made.model)
    out = tmp_path / "paper"
    (given,) = held.promote(to=file, seeds=1, weights=PAPER.params, arm="weights", out=out)
    assert (given.model.folder, given.model.number) == (out, 3)
    wrong = {
        "unless `to` is given, got 0,1": {"seeds": [0, 1]},
        "unless `to` is given, got 0$": {"seeds": 0},
        "arm must be .*'weights'.*, got str 'best'": {"arm": "best"},
        "a must be": {"weights": {"a": "high", "b": 0}},
        "method.kimg": {"kimg": 0},
        "method.nfe": {"nfe": 0},
        "workers must be": {"workers": 0},
    }
    for message, asked in wrong.items():
        with pytest.raises(InputError, match=message):
            held.promote(**asked)
    assert confirmed.sibling("digits.promote") is None


def test_a_model_is_of_the_arm_that_was_planned(confirmed):
    """Even if somebody confirms anew while it trains."""
    finish(promote(confirmed, 1), fid)
    keep(confirmed.sibling("digits.promote"), 2)
    promotion = Promotion(confirmed, Asked(seeds=1))
    planned, arm = promotion.run(1)
    plan_confirmation(confirmed, method={}, seeds=5, count=2)
    with pytest.raises(InputError, match="has not ended"):
        confirmed_arm(confirmed)
    (model,) = promotion.models(planned, arm)
    assert (model.model.number, model.recommended.arm) == (2, arm)


def test_each_nfe_has_a_model_and_other_weights_another(confirmed, tmp_path):
    verb = ("promote", "digits", "--seeds", "1")
    for arm in (confirmed_arm(confirmed), PAPER):
        study = plan_promotion(
            confirmed.url,
            arms_study(confirmed.spec, "digits.promote"),
            arm,
            seeds=[4],
            variants=({}, {"nfe": 3}, {"kimg": 5.0}),
        )
        finish(study, fid)
    keep(study, 2, 5, 8, 9)

    def exported(*options: str) -> dict[str, str]:
        answer = command(*verb, *options)
        assert answer.status == 0, answer.err
        folders = re.findall(r"^model folder: (.*)$", answer.out, re.MULTILINE)
        return {Path(path).name: denoiser_sha256(load_model(path)[0]) for path in folders}

    # Rows: plain, uniform, winner at 2 NFE, at 3, and longer; then the given weights'.
    assert exported() == {"model": digest(2)}
    assert exported("--nfe", "2,3") == {"model-nfe2": digest(2), "model-nfe3": digest(5)}
    assert exported("--nfe", "3", "--out", str(tmp_path / "mine")) == {"mine": digest(5)}
    assert exported("--kimg", "5") == {"model-kimg5": digest(8)}
    assert exported("--weights", "1.386,-4.274") == {"model": digest(9)}
    assert exported() == {"model": digest(2)}


@pytest.mark.parametrize(("options", "row"), [((), 0), (("--arm", "weights"), 2)])
def test_a_student_that_loses_to_plain_distillation_is_exported_only_on_request(
    confirmed, tmp_path, options, row
):
    study = promote_to(confirmed, 3)
    finish(study, lambda arm, row: {"plain": 4.0, "uniform": 8.0, None: 4.5}[arm.baseline])
    keep(study, 0, 1, 2)
    arguments = ("promote", "digits", "--to", write(tmp_path, PROMOTION))
    answer = command(*arguments, "--seeds", "3", *options)
    (model,) = re.findall(r"^model folder: (.*)$", answer.out, re.MULTILINE)
    assert denoiser_sha256(load_model(model)[0]) == digest(row)
    assert "recommended: plain" in answer.out
    card = (Path(model) / "README.md").read_text()
    assert all(arm.name in card for arm in study.arms)


def test_a_dry_run_plans_nothing_and_prints_what_a_launch_would_take(
    confirmed, tmp_path, monkeypatch
):
    """What it costs is measured elsewhere."""
    monkeypatch.setenv("RAY_TMPDIR", "/proc")  # which only a launch would need
    monkeypatch.setattr(
        "search.worker.distillation.cost_lines", lambda *_, **__: ["what it costs"]
    )
    to = ("promote", "digits", "--to", write(tmp_path, PROMOTION), "-n")
    answer = command(*to, "--seeds", "4,5")
    assert answer.status == 0, answer.err
    told = yaml.safe_load(answer.out)
    arms = ["plain", "uniform", {"winner_of": "digits"}]
    assert told["plan"] | {"arms": arms, "seeds": [4, 5], "latents": "shared"} == told["plan"]
    assert spec(told) == promotion(plan={"arms": arms, "seeds": [4, 5]})
    assert answer.out.startswith(
        f"# what it costs\n# fingerprint {promotion().fingerprint()}\nname: "
    )
    own = yaml.safe_load(command("promote", "digits", "-n", "--weights", "1,2", "--kimg", "5").out)
    assert own["plan"]["arms"][2] == {"a": 1.0, "b": 2.0}
    assert (own["plan"]["seeds"], own["plan"]["variants"]) == ([4, 5, 6], [{"kimg": 5.0}])
    assert confirmed.sibling("promote-digits") is confirmed.sibling("digits.promote") is None


def test_a_confirmations_and_a_transfers_dry_run_print_the_rows_that_they_would_plan(
    searched, tmp_path, monkeypatch
):
    """Each variant of the settings has a cost of its own."""
    told = []

    def cost_lines(study, **_):
        told.append((study.plan.num_rows(study), study.method.options["kimg"]))
        return ["what it costs"]

    monkeypatch.setattr("search.worker.distillation.cost_lines", cost_lines)
    options = ("--kimg", "5", "--seeds", "4", "--candidates", "2")
    answer = command("confirm", "digits", "-n", *options)
    assert answer.status == 0, answer.err
    assert answer.out.startswith("# with kimg 5.0:\n#   what it costs\n# fingerprint ")
    assert told == [(16, 5.0)]
    would = yaml.safe_load(answer.out)
    planned = plan_confirmation(searched, method={"kimg": 5.0}, seeds=4, count=2)
    assert would["name"] == planned.name
    assert would["plan"]["arms"] == [arm.baseline or arm.params for arm in planned.arms]
    assert would["plan"]["seeds"] == sorted({row.seed for row, _ in planned.rows()})
    # Called again it tells what is there already, and keeps to it.
    again = command("confirm", "digits", "-n", *options[:2], "--seeds", "3", *options[4:])
    assert "in the storage already: digits.confirm: 0 of 16 rows" in again.out
    assert yaml.safe_load(again.out)["plan"] == would["plan"]
    assert "--json is for the result" in refused(command("confirm", "digits", "-n", "--json"))

    other = write(tmp_path, name="other")
    answer = command("transfer", "digits", "--to", other, "--top", "1", "--dry-run")
    assert answer.status == 0, answer.err
    would = yaml.safe_load(answer.out)
    assert searched.sibling(would["name"]) is None
    planned = plan_transfer(
        searched, read_spec(Path(other)), top=1, seeds=len(would["plan"]["seeds"])
    )
    assert would["name"] == planned.name
    assert would["plan"]["arms"] == [arm.baseline or arm.params for arm in planned.arms]


@pytest.mark.parametrize(
    ("to", "options", "message"),
    [
        (True, "--weights nonsense", "--weights nonsense is no A,B"),
        (True, "--weights 1000,0", "no positive, finite sum at K = 2"),
        (True, "--nfe 2", "method.nfe is unknown"),
        (True, "--out .", ". exists already"),
        (True, "--seeds 0,0", "seeds [0, 0] must name"),
        (True, "--seeds=-1,0", "seeds must be a list of whole numbers of at least 0"),
        (False, "--seeds 0,1", "unless --to is given, got 0,1"),
        (False, "--seeds 0", "unless --to is given, got 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(confirmed, tmp_path, to, options, message):
    other = ("--to", write(tmp_path, PROMOTION)) if to else ()
    assert message in refused(command("promote", "digits", *other, *options.split()))
    assert confirmed.sibling("promote-digits") is confirmed.sibling("digits.promote") is None


def test_what_cannot_be_promoted_to_is_refused(confirmed, tmp_path):
    a_search = write(tmp_path, weights=NORMALISED)
    told = refused(command("promote", "digits", "--to", a_search))
    assert "--to names digits, a search; give a study of given arms" in told
    taken = write(tmp_path, PROMOTION, name="digits")
    told = refused(command("promote", "digits", "--to", taken))
    assert "exists and is a search" in told


def test_without_a_confirmed_winner_nothing_is_promoted(searched, tmp_path):
    for verb in (("promote", "digits"), ("promote", "digits", "--to", write(tmp_path, PROMOTION))):
        assert "only a best of n that may have been lucky" in refused(command(*verb))
        assert "only a best of n that may have been lucky" in refused(command(*verb, "-n"))
    planned = plan_confirmation(searched, method={}, seeds=3, count=1)
    told = refused(command("promote", "digits"))
    assert "--weights is needed: study digits has no confirmed winner" in told
    with pytest.raises(InputError, match=r"^weights is needed: .* first, or give it$"):
        open_study("digits").promote()
    finish(planned, fid, most=3)
    assert "digits has not ended" in refused(command("promote", "digits"))


# ---- transfer ----


def test_a_transfer_from_python_is_the_command_s(searched, tmp_path):
    file = write(tmp_path, name="other")
    planned = plan_transfer(searched, read_spec(Path(file)), top=1, seeds=2)
    finish(planned, lambda arm, row: 9.0 + row.seed + (arm.baseline is None))
    found = open_study("digits").transfer(file, top=1, seeds=2)
    assert [each.arm.baseline for each in found.results] == ["plain", "uniform", None]
    assert [sorted(each.values) for each in found.results] == [[1, 2]] * 3
    assert [each.mean().mean for each in found.results] == [10.5, 10.5, 11.5]
    printed = command("transfer", "digits", "--to", file, "--top", "1", "--seeds", "2").out
    assert "\n".join(found.table()) in printed
    with pytest.raises(InputError, match="top must be at least 1"):
        open_study("digits").transfer(file, top=0)


def test_what_cannot_be_transferred_is_refused(searched, tmp_path):
    file = write(tmp_path, weights=NORMALISED)
    own = command("transfer", "digits", "--to", file)
    assert "--to names study digits itself" in refused(own)
    assert "no study 'nobody'" in refused(command("transfer", "nobody", "--to", file))
    absent = command("transfer", "digits", "--to", "absent.yaml")
    assert "absent.yaml cannot be read" in refused(absent)
