"""``evaluation.images: auto``: the pilot that settles a study's number of images."""

import json
from dataclasses import asdict, replace

import pytest

from bdense.errors import InputError, StoppedError
from bdense.metrics.records import FID
from search import cli, open_study
from search.analysis.pilot import images_of, plan_pilot
from search.errors import SpecChangedError
from search.run.launch import _settled, run_planned
from search.spec.sections import PILOT_IMAGES
from search.storage.stop_flags import Launch, is_asked
from search.study.catalogue import list_studies
from search.study.study import Study, intermediate_of
from search.verbs.launch import dry_run
from search.worker.worker import Worker
from tests.measured import command, finish, normalised, search
from tests.programs import work
from tests.rows import SFD
from tests.studies import write


def auto(**keys):
    return normalised(evaluation={"images": "auto"}, **keys)


def piloted(url, values, monkeypatch, **keys) -> Study:
    """A pilot whose FIDs are plain 4 and uniform ``values``, with latents' noise of 0.5."""
    pilot = plan_pilot(url, auto(**keys))
    read = FID.as_dict

    def as_dict(found: FID):
        effects = (0.5, -0.5) if found.value >= 4 else (0.0, 0.0)
        return read(replace(found, effects=effects, images=PILOT_IMAGES))

    monkeypatch.setattr(FID, "as_dict", as_dict)
    finish(pilot, lambda arm, row: 4 if arm.baseline == "plain" else values[row.seed])
    return pilot


def test_a_pilot_trains_both_baselines_under_three_seeds_on_the_same_latents(url):
    pilot = plan_pilot(url, auto(seeds={"training": 5, "evaluation": 7}))
    found = [(pilot.arms[row.arm].baseline, row.seed) for row, _ in pilot.rows()]
    assert sorted(found) == [(arm, seed) for arm in ("plain", "uniform") for seed in (5, 6, 7)]
    assert pilot.spec.evaluation.images == PILOT_IMAGES
    tasks = [pilot.task(pilot.given, asdict(row)) for row, _ in pilot.rows()]
    assert {task.latents for task in tasks} == {7}


@pytest.mark.parametrize(
    ("values", "images"),
    [
        # Seeds 1.0, latents 0.5: balanced already.
        ((3, 2, 1), PILOT_IMAGES),
        # Seeds 0.5, latents 0.5: four times as many.
        ((3, 2.5, 2), 4 * PILOT_IMAGES),
        # Seeds 0.05, latents 0.5: 400 times as many would.
        ((3, 2.95, 2.9), 50_000),
    ],
)
def test_as_many_images_as_halve_the_latents_noise(url, values, images, monkeypatch):
    pilot = piloted(url, values, monkeypatch)
    found, noise = images_of(pilot)
    assert noise.latents == pytest.approx(0.5)
    assert found == images


def test_a_pilot_that_cannot_tell_is_refused(url):
    pilot = plan_pilot(url, auto())
    finish(pilot, lambda arm, _: 4 if arm.baseline == "plain" else 3, most=2)
    with pytest.raises(InputError, match=r"evaluation\.images auto: 2 of the 6 rows"):
        images_of(pilot)


def test_a_stored_study_keeps_its_number(url):
    """A file with auto is the study that its pilot settled, in all verbs."""
    spec = auto()
    stored = search(url, [({"a": 1.0}, 12.5)], study=spec.with_images(8192))
    stored.refuse_other_conditions(spec)
    assert Study.create(url, spec).spec.evaluation.images == 8192
    other = replace(spec, evaluation=replace(spec.evaluation, images=4096))
    with pytest.raises(InputError, match="8192"):
        stored.refuse_other_conditions(other)


def test_a_study_that_has_not_begun_takes_its_number_from_a_pilot(url, monkeypatch):
    """Also opened in Python, and again; points that were planned before stay."""
    Study.create(url, auto().with_images(8192))
    study = open_study(auto(), storage=url)
    assert study.enqueue(a=0.3)
    assert study.spec.evaluation.images == "auto"
    piloted(url, (3, 2.5, 2), monkeypatch)
    # The pilot is complete: nothing is trained.
    settled = _settled(study.record, None, Launch.begin(study.record.ledgers))
    assert settled.spec.evaluation.images == study.spec.evaluation.images == 4 * PILOT_IMAGES
    assert (settled.counts().waiting, settled.given.counts().planned) == (1, 2)
    # A second launch, or a look from Python, leaves what was settled.
    again = open_study(auto(), storage=url)
    assert (again.spec, again.record.given.counts().planned) == (settled.spec, 2)


def test_intermediate_fids_take_the_settled_number_too(url, monkeypatch):
    plan = {"trials": 4, "at": [0.5]}
    study = open_study(auto(plan=plan), storage=url)
    piloted(url, (3, 2.5, 2), monkeypatch, plan=plan)
    settled = _settled(study.record, None, Launch.begin(study.record.ledgers))
    assert intermediate_of(settled.spec)["images"] == 4 * PILOT_IMAGES


def test_no_row_of_a_search_is_begun_before_its_pilot(url):
    study = Study.create(url, auto())
    with pytest.raises(SpecChangedError, match="pilot"):
        Worker(study)


def test_a_stop_that_comes_as_the_pilot_ends_is_heard(url, monkeypatch):
    study = open_study(auto(), storage=url)
    piloted(url, (3, 2.5, 2), monkeypatch)
    monkeypatch.setattr("search.run.launch.run_rows", lambda *_: study.stop())
    with pytest.raises(StoppedError):
        run_planned(study.record, None)


def test_a_stop_that_comes_between_pilot_and_search_is_heard(url, monkeypatch):
    study = open_study(auto(), storage=url)
    piloted(url, (3, 2.5, 2), monkeypatch)
    begun = []
    monkeypatch.setattr("search.run.launch.plan_first_points", lambda _: study.stop())
    monkeypatch.setattr("search.run.launch.run", lambda study, launch, **_: begun.append(launch))
    run_planned(study.record, None)
    (launch,) = begun
    assert is_asked(study.record.ledgers, launch)


def test_nothing_is_planned_for_what_is_refused_later(url):
    with pytest.raises(InputError, match=r"plan\.prior"):
        open_study(auto(plan={"trials": 4, "prior": ["nowhere"]}), storage=url)
    with pytest.raises(InputError, match=r"evaluation\.images auto .*give a number"):
        auto(plan={"arms": ["plain"], "seeds": [0]})


def test_a_dry_run_tells_the_pilots_cost(capsys, monkeypatch):
    def rows_of(spec, **_):
        return [f"{spec.plan.num_rows(spec)} rows of it"]

    monkeypatch.setattr("search.worker.distillation.cost_lines", rows_of)
    spec = auto(plan={"trials": 9, "replicates": 1})
    dry_run(spec, None)
    out = capsys.readouterr().out
    assert out.index("6 rows of it") < out.index("11 rows of it")
    assert "images: auto" in out


def test_a_launch_trains_the_pilot_then_the_search_and_races_its_seeds(
    url, monkeypatch, tmp_path, shared_cache
):
    """Really, but for the numbers of images, which are for a GPU."""
    monkeypatch.setenv("BDENSE_CACHE", str(shared_cache))
    monkeypatch.setattr("search.spec.sections.PILOT_IMAGES", 64)
    monkeypatch.setattr("search.analysis.pilot.MOST_IMAGES", 128)
    monkeypatch.setattr("search.run.launch.run", lambda study, *_, **__: work(study))
    plan = {"trials": 4, "race": 1, "replicates": 2}
    file = write(tmp_path, SFD, plan=plan, evaluation__images="auto")
    assert command("launch", file).status == 0
    images, noise = images_of(Study.open(url, "digits.pilot"))
    assert noise.replicates == 3
    study = Study.open(url, "digits")
    assert study.spec.evaluation.images == images
    # Of four trials one is the replicate of the most promising of the three points.
    assert (study.left(), study.search.counts().complete) == (0, 3)
    (raced,) = (row for row, _ in study.rows() if study.arms[row.arm].trial is not None)
    assert raced.seed == study.spec.baseline_seeds[1]
    told = json.loads(command("best", file, "--json").out)
    assert told["best"]["images"] == images
    assert told["noise"]["least_difference"] > 0
    assert told["best"]["number"] == study.arms[raced.arm].trial


def test_a_pilot_stops_and_goes_with_its_study(url, monkeypatch, tmp_path):
    monkeypatch.setenv("BDENSE_RUNS", str(tmp_path / "runs"))
    pilot = piloted(url, (3, 2, 1), monkeypatch)
    study = search(url, [({"a": 1.0}, 12.5)], study=auto().with_images(PILOT_IMAGES))
    launch = Launch.begin(pilot.ledgers)
    assert cli.main(["stop", study.name, "--storage", url]) == 0
    assert is_asked(pilot.ledgers, launch)
    assert [each.name for each in list_studies(url)] == [study.name, f"{study.name}.pilot"]
    assert cli.main(["delete", study.name, "--yes", "--storage", url]) == 0
    assert list_studies(url) == []
