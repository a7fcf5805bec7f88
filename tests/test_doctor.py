"""``bdense-search doctor`` on studies that are damaged on purpose: each fault found and named."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import optuna
import pytest
import sqlalchemy as sa
from sqlalchemy.engine import make_url

from benchmarks.large_study import fill
from search.cli import main
from search.doctor import storage as doctor_storage
from search.doctor.examination import examine_study
from search.doctor.finding import Finding
from search.doctor.machine import check_machine, wants_of
from search.doctor.rows import subjects
from search.doctor.storage import check_storage, engine_of
from search.spec.space import baseline_space, make_sampler, search_space
from search.storage.engine import open_storage, resolve_storage_url
from search.storage.leases import LEASE
from search.storage.ledger import Claim, Ledger
from search.study.arms import PLAIN, SPACES, UNIFORM, Planned, PlannedRow
from search.study.artifacts import artifact_store, attach
from search.study.study import BASELINES_SUFFIX, FINGERPRINT, Study
from search.study.summary import copy_baselines
from tests.contracts.scene import lease_rows
from tests.disks import small_disk
from tests.studies import NORMALISED, spec

SPEC = spec(name="digits", budget__trials=4, keep_students=1)
CONDITIONS = {
    "nfe": 2,
    "images": 256,
    "extractor": "digits-classifier",
    "extractor_sha256": "0",
    "reference": "digits",
    "reference_images": 1797,
    "seeds": {"training": 0, "evaluation": 0},
}
VERSIONS = {"bdense": "0.1.0", "torch": "2.11.0"}


@dataclass
class Patient:
    """A study in a storage, with the files that its workers would leave."""

    url: str
    runs: Path

    @property
    def study(self) -> Study:
        return Study.open(self.url, SPEC.name)

    def take(self, ledger: Ledger) -> Claim:
        of_baselines = ledger.study.study_name.endswith(BASELINES_SUFFIX)
        space = baseline_space() if of_baselines else search_space(SPEC)
        claim = ledger.claim(space, partial(make_sampler, SPEC))
        assert isinstance(claim, Claim)
        return claim

    def finish(self, ledger: Ledger, claim: Claim | None = None, value: float = 3.0, **attrs):
        """Complete a trial as a worker does."""
        claim = claim or self.take(ledger)
        folder = self.folder(ledger, claim.number)
        folder.mkdir(parents=True)
        for name in ("samples.png", "student.safetensors"):
            (folder / name).write_bytes(b"0")
        self.mark(ledger, claim)
        (folder / "result.json").write_text(json.dumps({"value": value}))
        stored = {
            "fid": CONDITIONS,
            "weights": [1.0],
            "fingerprint": SPEC.fingerprint(),
            "versions": VERSIONS,
            "student": f"{ledger.study.study_name}/{claim.number:05d}/student.safetensors",
        }
        ledger.complete(claim, value, stored | attrs)
        return claim.number

    def mark(self, ledger: Ledger, claim: Claim, **other) -> None:
        """Say in a row's folder whose it is, as its worker does."""
        identity = {"params": dict(claim.params), "fingerprint": SPEC.fingerprint()} | other
        (self.folder(ledger, claim.number) / "trial.json").write_text(json.dumps(identity))

    def folder(self, ledger: Ledger, number: int) -> Path:
        return self.runs / ledger.study.study_name / f"{number:05d}"

    def sql(self, statement: str, **values) -> None:
        # Not through Optuna, which refuses tables that the first such statement has altered.
        engine = engine_of(self.url)
        with engine.begin() as connection:
            connection.execute(sa.text(statement), values)

    def findings(self, *, fix: bool = False, name: str | None = None) -> list[Finding]:
        engine = engine_of(self.url)
        return [
            finding
            for of in subjects(engine, name)
            for finding in examine_study(self.url, engine, of, fix=fix)
        ]

    def worse(self, **options) -> list[Finding]:
        """All that is not well."""
        return [each for each in self.findings(**options) if each.level != "ok"]

    def only(self, level: str, text: str, **options) -> Finding:
        """The one thing that is not well."""
        found = self.worse(**options)
        assert [(each.level, text in each.line()) for each in found] == [(level, True)], [
            each.line() for each in found
        ]
        return found[0]


def healthy(url: str, runs: Path) -> None:
    """Both baselines and two of four trials are complete: nothing is wrong with it."""
    study, patient = Study.create(url, SPEC), Patient(url, runs)
    for _ in range(2):
        patient.finish(study.baselines)
    for value in (3.0, 2.0):
        patient.finish(study.trials, value=value)
    # Only the best of a search keeps its student.
    (patient.folder(study.trials, 0) / "student.safetensors").unlink()
    copy_baselines(study)


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """A healthy study in a file, and its runs, to be copied."""
    folder = tmp_path_factory.mktemp("original") / "runs"
    healthy(f"sqlite:///{folder}/bdense.db", folder)
    return folder


@pytest.fixture(scope="module")
def server_original(postgres, tmp_path_factory) -> str:
    """Name of a database with the same study, to be copied."""
    url = resolve_storage_url(postgres.new_database())
    healthy(url, tmp_path_factory.mktemp("server"))
    return str(make_url(url).database)


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def patient(request, tmp_path, monkeypatch, original) -> Patient:
    """A healthy study."""
    runs = tmp_path / "runs"
    monkeypatch.setenv("BDENSE_RUNS", str(runs))
    shutil.copytree(original, runs)
    if request.param == "sqlite":
        return Patient(resolve_storage_url(None), runs)
    postgres, name = request.getfixturevalue("postgres"), f"patient_{uuid.uuid4().hex[:12]}"
    template = request.getfixturevalue("server_original")
    server = sa.create_engine(postgres.url("postgres"), isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        # A database is copied while nobody is connected to it.
        connection.execute(
            sa.text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :of"),
            {"of": template},
        )
        connection.execute(sa.text(f"CREATE DATABASE {name} TEMPLATE {template}"))
    server.dispose()
    return Patient(resolve_storage_url(postgres.url(name)), runs)


def test_nothing_is_said_against_a_healthy_study(patient):
    assert [each.line() for each in patient.worse()] == []
    rows = next(each for each in patient.findings() if each.check == "rows")
    assert rows.line() == (
        "ok       digits: rows: 4 planned = 2 complete + 0 pruned + 0 failed + 0 running + "
        "0 waiting + 2 not asked for yet"
    )


# Rows and leases.


def run_a_worker(patient: Patient) -> subprocess.Popen:
    """A process that claims a trial and holds it."""
    program = (
        "import sys, time\n"
        "from tests.test_doctor import Patient\n"
        "from pathlib import Path\n"
        "patient = Patient(sys.argv[1], Path(sys.argv[2]))\n"
        "ledger = patient.study.trials\n"
        "with ledger.holding(patient.take(ledger)):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(60)\n"
    )
    worker = subprocess.Popen(
        [sys.executable, "-c", program, patient.url, str(patient.runs)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert worker.stdout.readline() == "held\n"
    return worker


def test_a_dead_workers_trial_is_freed_and_a_live_ones_is_not(patient):
    worker = run_a_worker(patient)
    try:
        assert patient.worse(fix=True) == []
        assert len(lease_rows(patient.url)) == 1
        assert any("trial 2 are held" in each.text for each in patient.findings())
    finally:
        worker.send_signal(signal.SIGKILL)
        worker.wait()
    found = patient.only("warning", "(attempt 1) is dead")
    assert f":{worker.pid} " in found.text
    patient.only("mended", "is dead", fix=True)
    assert patient.worse() == []
    claim = patient.take(patient.study.trials)
    assert (claim.number, claim.attempt, claim.adopted) == (2, 2, True)


def test_a_lease_that_ended_elsewhere_is_freed(patient):
    """Its worker is on another machine, so only the clock tells; a thousand seconds ago."""
    ledger = Ledger.open(patient.url, SPEC.name, budget=None, ttl=0.2)
    patient.take(ledger)
    time.sleep(0.3)  # a server that has just been started is not trusted for a lease's time
    patient.sql(
        "UPDATE bdense_lease SET host = 'box-7', boot = 'b', pid = 7, expires = expires - 1000"
    )
    found = patient.only("warning", "its worker box-7:7 (attempt 1) has not renewed its lease")
    assert re.search(r"which ended 1\d\d\d s ago", found.text)
    patient.only("mended", "box-7:7", fix=True)
    with open_storage(patient.url).engine.connect() as connection:
        lease = connection.execute(sa.select(LEASE)).one()
    assert (lease.expires, lease.owner, lease.attempt) == (0.0, "", 1)


def test_a_trial_that_nobody_ever_took_is_named(patient):
    patient.study.trials.study.ask(search_space(SPEC))
    patient.only("warning", "trial 2 run and were never taken by a worker")


def test_leases_of_ended_trials_are_swept(patient):
    ledger = patient.study.trials
    claim = patient.take(ledger)
    leases = open_storage(patient.url)
    with leases.engine.connect() as connection:
        row = connection.execute(sa.select(LEASE)).mappings().one()
    patient.finish(ledger, claim)
    with leases.engine.begin() as connection:
        connection.execute(sa.insert(LEASE).values(dict(row)))
    patient.only("mended", "trial 2 have ended and their leases are still there", fix=True)
    assert lease_rows(patient.url) == []


def test_equal_parameters_are_a_remark_in_a_search_and_an_error_among_planned_rows(patient):
    study = patient.study
    params = study.trials.study.trials[0].params
    study.trials.study.enqueue_trial(params)
    patient.finish(study.trials)
    patient.only("warning", "rows 0, 2 have the same parameters")
    study.baselines.study.enqueue_trial({"method": "sfd"})
    study.baselines.resize()
    patient.finish(study.baselines)
    found = [each for each in patient.worse() if each.level == "problem"]
    assert [each.study for each in found] == ["digits.baselines"]
    assert 'rows 0, 2 have the same parameters {"method": "sfd"}' in found[0].text


def test_a_planned_row_that_failed_may_be_there_again(patient):
    baselines = Study.create(patient.url, spec(name="other")).baselines
    baselines.fail(patient.take(baselines), "error", "tripped", {})
    baselines.study.enqueue_trial({"method": "sfd"})
    baselines.resize()
    for _ in range(2):
        patient.finish(baselines)
    assert [t.params["method"] for t in baselines.study.trials] == ["sfd", "uniform", "sfd"]
    patient.only("mended", "other: baselines: their results are not", fix=True, name="other")


def test_a_budget_that_was_lowered_and_points_beyond_it(patient):
    ledger = patient.study.trials
    for number in range(3):
        ledger.study.enqueue_trial({"a": 0.1 * number, "b": -1.0})
    patient.only("warning", "1 of 3 rows that wait lie beyond the budget of 4")
    Ledger.open(patient.url, SPEC.name, budget=1)
    patient.only("warning", "2 rows were begun and the budget is 1")


# What it was measured under.


def test_trials_measured_by_different_versions_are_told_apart(patient):
    patient.finish(patient.study.trials, versions=VERSIONS | {"torch": "2.12.0"})
    patient.only("warning", "torch differs between trials: 2.11.0 in 2, 2.12.0 in 1")


def test_a_trial_under_other_conditions_is_a_problem(patient):
    patient.finish(patient.study.trials, fingerprint="feedfeedfeedfeed")
    patient.only("problem", "trial 2 were measured under other conditions")


def test_an_installation_that_would_measure_otherwise_is_a_problem(patient):
    patient.study.trials.study.set_user_attr(FINGERPRINT, "feedfeedfeedfeed")
    found = patient.worse()
    assert any(
        each.level == "problem" and "would be refused as a worker" in each.text for each in found
    )


def test_a_study_half_made(patient):
    optuna.create_study(study_name="cut-short", storage=open_storage(patient.url))
    patient.only("warning", "cut-short: study: it was made by something else, or by a launch")
    Ledger.open(patient.url, "cut-short", budget=3)
    patient.only("warning", "its maker was killed before it was whole")


def test_baselines_are_copied(patient):
    patient.study.trials.study.set_user_attr("baselines", {})
    patient.only("warning", "their results are not in the study's attributes")
    patient.only("mended", "their results", fix=True)
    assert list(patient.study.trials.study.user_attrs["baselines"]) == ["sfd", "uniform"]
    assert patient.worse() == []


# Files.


def test_missing_and_altered_files_are_problems_that_nothing_mends(patient):
    ledger = patient.study.trials
    folder = patient.folder(ledger, 1)
    (folder / "student.safetensors").unlink()
    patient.only("problem", "trial 1 should have a student's file and does not", fix=True)
    (folder / "student.safetensors").write_bytes(b"0")
    (folder / "result.json").write_text(json.dumps({"value": 1.0}))
    patient.only("problem", "the FID of trial 1 is not that of its result.json", fix=True)
    (folder / "result.json").unlink()
    patient.only("problem", "complete trial 1 lack result.json", fix=True)
    (folder / "result.json").write_text(json.dumps({"value": 2.0}))
    (folder / "samples.png").unlink()
    patient.only("warning", "complete trial 1 lack samples.png", fix=True)


def test_a_runs_folder_of_another_machine(patient, monkeypatch, tmp_path):
    monkeypatch.setenv("BDENSE_RUNS", str(tmp_path / "elsewhere"))
    found = patient.worse()
    assert [each.study for each in found] == ["digits", "digits.baselines"]
    assert "none of its 2 complete rows has files here" in found[0].text
    assert "set BDENSE_RUNS" in found[0].advice


def test_leftovers_of_finished_rows_are_deleted_and_those_of_running_ones_are_not(patient):
    ledger = patient.study.trials
    running = patient.take(ledger)
    kept = patient.folder(ledger, running.number)
    kept.mkdir()
    left = [
        patient.folder(ledger, 0) / "checkpoint.safetensors",
        patient.folder(ledger, 0) / "00004.training.safetensors",
        patient.folder(ledger, 0) / ".checkpoint.safetensors.x1.partial",
        patient.folder(ledger, 0) / ".student.safetensors.x1.partial",
        kept / "checkpoint.safetensors",
        kept / ".checkpoint.safetensors.x2.partial",
    ]
    for path in left:
        path.write_bytes(b"0" * 2**20)
    for old in (left[2], left[5]):
        os.utime(old, (0, 0))
    patient.only("warning", "3 checkpoints and unfinished files that nobody needs, 3.0 MiB")
    patient.only("mended", "3 checkpoints", fix=True)
    # Of an unfinished file that is fresh somebody may be in the middle.
    assert [path.exists() for path in left] == [False, False, False, True, True, True]
    assert (patient.folder(ledger, 1) / "student.safetensors").exists()
    assert patient.worse() == []


def test_a_checkpoint_of_another_database_s_row_stays(patient):
    """Its study has the same name, and its worker moved our folder aside."""
    ledger = patient.study.trials
    claim = patient.take(ledger)
    ledger.fail(claim, "diverged", "nan", {"fingerprint": SPEC.fingerprint()})
    folder = patient.folder(ledger, claim.number)
    folder.mkdir()
    live = folder / "checkpoint.safetensors"
    for theirs in ({"params": {"a": 0.1, "b": -1.0}}, {"fingerprint": "feedfeedfeedfeed"}):
        patient.mark(ledger, claim, **theirs)
        live.write_bytes(b"0")
        found = patient.only("warning", "the folders of trial 2, which have ended", fix=True)
        assert "another study's of this name" in found.text
        assert live.exists()
    patient.mark(ledger, claim)
    patient.only("mended", "1 checkpoints", fix=True)
    assert not live.exists()


def test_rows_of_arms_are_known_by_their_arms(tmp_path, monkeypatch):
    monkeypatch.setenv("BDENSE_RUNS", str(tmp_path))
    url = resolve_storage_url(None)
    planned = Planned.create(url, "rows", "retrain", SPEC, facts={})
    planned.plan([PLAIN, UNIFORM], [PlannedRow(arm=1, seed=7, kimg=1.0, nfe=2)])
    claim = planned.ledger.claim(SPACES["retrain"], None)
    planned.ledger.fail(claim, "diverged", "nan", {"fingerprint": "0123"})
    patient = Patient(url, tmp_path)
    (folder := patient.folder(planned.ledger, 0)).mkdir(parents=True)
    (folder / "checkpoint.safetensors").write_bytes(b"0")
    for arm, text in ((PLAIN, "another study's of this name"), (UNIFORM, "1 checkpoints")):
        patient.mark(planned.ledger, claim, params=arm.params, fingerprint="0123")
        patient.only("warning", text)


def test_pictures_that_are_not_where_the_database_says(patient):
    ledger = patient.study.trials
    claim = patient.take(ledger)
    picture = patient.runs / "grid.png"
    picture.write_bytes(b"0")
    attach(open_storage(patient.url), claim.trial_id, [picture], artifact_store())
    patient.finish(ledger, claim)
    assert patient.worse() == []
    (stored,) = (patient.runs / "artifacts").iterdir()
    stored.unlink()
    patient.only("warning", "trial 2 have pictures in the database that are not in")


def test_folders_of_no_row_are_named_and_stay(patient):
    for name in ("00009", "00001.0123abcd"):
        (patient.runs / "digits" / name).mkdir()
    found = patient.only("warning", "2 folders are of no row of this database", fix=True)
    assert "00001.0123abcd" in found.text
    assert (patient.runs / "digits" / "00009").is_dir()


@pytest.mark.slow
def test_ten_thousand_trials_and_their_folders_take_seconds(patient):
    large = spec(name="large", budget__trials=10_000, weights=NORMALISED, keep_students=1)
    study = Study.create(patient.url, large)
    fill(study, open_storage(patient.url), large, 10_000)
    for number, value in study.trials.complete_values().items():
        folder = patient.folder(study.trials, number)
        folder.mkdir(parents=True)
        for name in ("samples.png", "student.safetensors", "trial.json"):
            (folder / name).touch()
        (folder / "result.json").write_text(json.dumps({"value": value}))
    (patient.folder(study.trials, 4321) / "result.json").write_text(json.dumps({"value": 0}))
    begun = time.monotonic()
    found = [each.line() for each in patient.worse(name="large")]
    seconds = time.monotonic() - begun
    assert len(found) == 1, found
    assert "the FID of trial 4321 is not that of its result.json" in found[0]
    sys.stderr.write(f"doctor over 10,000 trials: {seconds:.1f} s\n")
    assert seconds < 45


# The storage.


def storage_findings(url: str) -> list[Finding]:
    return [each for each in check_storage(url, engine_of(url)) if each.level != "ok"]


def test_a_healthy_storage(patient):
    assert storage_findings(patient.url) == []
    checks = [each.check for each in check_storage(patient.url, engine_of(patient.url))]
    assert checks[:4] == ["storage", "schema", "schema", "rights"]


def test_old_and_new_tables(patient):
    patient.sql("UPDATE alembic_version SET version_num = 'v3.0.0.d'")
    (found,) = storage_findings(patient.url)
    assert "Optuna's tables are of version v3.0.0.d" in found.text
    assert "bdense-search storage upgrade" in found.advice
    patient.sql("UPDATE alembic_version SET version_num = 'v9.9.9.a'")
    (found,) = storage_findings(patient.url)
    assert found.advice == "update optuna and bdense here"


def test_lease_table_of_another_bdense(patient):
    patient.sql("ALTER TABLE bdense_lease DROP COLUMN progress")
    (found,) = storage_findings(patient.url)
    assert "table bdense_lease differs in progress" in found.text
    assert "bdense-search storage upgrade" in found.advice


@pytest.mark.postgres
def test_a_reader_is_told_that_it_launches_nothing(postgres):
    url = resolve_storage_url(postgres.new_database())
    Study.create(url, SPEC)
    patient = Patient(url, Path())
    role = f"reader_{os.getpid()}"
    patient.sql(f"CREATE ROLE {role} LOGIN")
    patient.sql(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}")
    as_reader = make_url(url).set(username=role).render_as_string(hide_password=False)
    (found,) = storage_findings(as_reader)
    assert found.text.startswith(f"user {role} lacks INSERT on bdense_lease and ")
    assert [each.level for each in storage_findings(url)] == []


@pytest.mark.postgres
def test_clocks_apart(postgres, monkeypatch):
    """Nobody can move the server's clock here: what counts as apart is moved instead."""
    url = resolve_storage_url(postgres.new_database())
    Study.create(url, SPEC)
    monkeypatch.setattr(doctor_storage, "CLOCK_SECONDS", -1.0)
    (found,) = storage_findings(url)
    assert (found.check, found.level) == ("clock", "warning")


def test_a_file_that_is_no_database(tmp_path):
    path = tmp_path / "study.db"
    assert storage_findings(f"sqlite:///{path}")[0].text == f"there is no database {path}"
    assert not path.exists()
    path.write_text("notes of mine, and no database at all")
    (found,) = storage_findings(f"sqlite:///{path}")
    assert "file is not a database" in found.text


def test_a_full_disk_and_one_that_cannot_be_written(tmp_path, monkeypatch):
    with small_disk(tmp_path / "disk", 512) as disk:
        monkeypatch.setenv("BDENSE_RUNS", str(disk.place))
        monkeypatch.setenv("BDENSE_STORAGE", f"sqlite:///{disk.place}/bdense.db")
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        storage = open_storage(resolve_storage_url(None))
        storage.remove_session()
        storage.engine.dispose()  # or the disk could not be mounted anew
        found = list(itertools.islice(check_machine([]), 2))
        assert [each.level for each in found] == ["problem", "problem"]
        assert "GiB are free where runs lie" in found[0].text
        disk.make_read_only()
        found = list(itertools.islice(check_machine([]), 2))
        assert "runs cannot be written" in found[0].text
        (found,) = storage_findings(resolve_storage_url(None))
        assert (found.check, found.level) == ("storage", "problem")
        assert "that it and its folder can be written" in found.advice


# The command.


def run(*arguments: str, capsys) -> tuple[int, str, str]:
    status = main(["doctor", *arguments])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_the_command_says_all_and_exits_by_it(patient, capsys, monkeypatch):
    monkeypatch.setenv("BDENSE_STORAGE", patient.url)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    left = patient.folder(patient.study.trials, 0) / "checkpoint.safetensors"
    left.write_bytes(b"0")
    status, out, _ = run("digits", "--json", capsys=capsys)
    answer = json.loads(out)
    assert (status, answer["ok"]) == (0, True)
    assert [f["check"] for f in answer["findings"] if f["level"] == "warning"] == ["leftovers"]
    (patient.folder(patient.study.trials, 0) / "result.json").unlink()
    status, out, err = run("--fix", capsys=capsys)
    assert status == 1
    assert "mended   digits: leftovers: 1 checkpoints" in out
    assert "problem  digits: files: complete trial 0 lack result.json; restore" in out
    assert "GPUs: " in out
    assert err.splitlines()[-1] == "bdense-search: 1 problem left; see above"
    status, _, err = run("nobody", capsys=capsys)
    assert status == 2
    assert "no study 'nobody' in " in err


def test_old_tables_are_a_problem_and_not_the_end_of_the_answer(patient, capsys, monkeypatch):
    monkeypatch.setenv("BDENSE_STORAGE", patient.url)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    patient.sql("UPDATE alembic_version SET version_num = 'v3.0.0.d'")
    status, out, err = run("digits", "--json", capsys=capsys)
    answer = json.loads(out)
    problems = [each for each in answer["findings"] if each["level"] == "problem"]
    assert (status, answer["ok"]) == (1, False)
    assert [each["check"] for each in problems] == ["schema", "storage"]
    assert "bdense-search storage upgrade" in problems[0]["advice"]
    assert "bdense-search storage upgrade" in problems[1]["text"]
    assert "2 problems left" in err


def test_a_spec_of_another_version_is_a_problem(patient):
    stored = json.loads(patient.study.trials.study.user_attrs["spec"]) | {"wings": 2}
    patient.study.trials.study.set_user_attr("spec", json.dumps(stored))
    found = patient.only("problem", "this bdense cannot read the study's spec (digits: wings: ")
    assert found.text.endswith("; use the version that launched it")


@pytest.mark.postgres
def test_a_reader_is_told_what_it_cannot_mend(postgres, tmp_path, monkeypatch):
    monkeypatch.setenv("BDENSE_RUNS", str(tmp_path))
    url = resolve_storage_url(postgres.new_database())
    healthy(url, tmp_path)
    owner = Patient(url, tmp_path)
    owner.study.trials.study.set_user_attr("baselines", {})
    role = f"looker_{os.getpid()}"
    owner.sql(f"CREATE ROLE {role} LOGIN")
    owner.sql(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}")
    reader = Patient(
        make_url(url).set(username=role).render_as_string(hide_password=False), tmp_path
    )
    reader.only("warning", "their results are not in the study's attributes")
    found = reader.only("problem", "mending failed: ", fix=True)
    assert "init, with --writer or --reader for this user" in found.line()


def test_a_server_that_does_not_answer_is_a_problem_of_several(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("BDENSE_RUNS", str(tmp_path))
    url = "postgresql://me:pw-Zq7@127.0.0.1:1/db"
    monkeypatch.setenv("BDENSE_STORAGE", url)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    status, out, err = run(capsys=capsys)
    assert status == 1
    assert "problem  storage: postgresql+psycopg2://me:***@127.0.0.1:1/db: " in out
    assert "problem  Ray: no Ray cluster answers at RAY_ADDRESS=127.0.0.1:1" in out
    assert "pw-Zq7" not in out + err
    assert "2 problems left" in err


def test_a_trial_that_fits_no_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("BDENSE_RUNS", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    wants = wants_of("digits", spec(resources__gpus=64).model_dump(mode="json"))
    (found,) = [each for each in check_machine([wants]) if each.level == "problem"]
    assert found.text.startswith("a trial asks for 1 CPUs and 64 GPUs of one machine; there are ")
