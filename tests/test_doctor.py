"""``bdense-search doctor``: a real broken state for each check, found, named and repaired."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import optuna
import pytest
import sqlalchemy as sa
from sqlalchemy.engine import make_url

from search import doctor
from search.doctor import Finding, examine, examine_study
from search.spec.space import search_space
from search.storage.engine import open_reading, open_storage, resolve_storage_url
from search.storage.ledger import Claim, Ledger
from search.storage.tables import LEASE
from search.study.artifacts import artifact_store, attach
from search.study.retention import CHECKPOINT, IDENTITY, RESULT, keep_too
from search.study.study import FINGERPRINT, SPEC, Study
from tests.contracts.scene import lease_rows, take
from tests.disks import small_disk
from tests.measured import VALLEY, command, complete, normalised, refused, search

# Trial 1 is the better of two: of a search that keeps one student it is the one that has a file.
TRIALS = VALLEY[:2]


def keeping_one(trials: int, **keys: object) -> object:
    return normalised(plan__trials=trials, keep_students=1, **keys)


@dataclass
class Patient:
    """A study in a storage, with the files that its workers would leave."""

    url: str
    runs: Path

    @property
    def study(self) -> Study:
        return Study.open(self.url, "digits")

    @property
    def trials(self) -> Ledger:
        return self.study.search

    def folder(self, number: int) -> Path:
        return self.runs / "digits" / f"{number:05d}"

    def take(self) -> Claim:
        return take(self.trials, space=search_space(self.study.spec))

    def finish(self, value: float = 9.5) -> int:
        claim = self.take()
        complete(self.study, self.trials, claim, value)
        write_files(self.study, self.trials, self.runs)
        return claim.number

    def sql(self, statement: str) -> None:
        with sa.create_engine(self.url).begin() as connection:
            connection.exec_driver_sql(statement)

    def findings(self, *, fix: bool = False) -> list[Finding]:
        found = [*examine_study(self.url, "digits"), *doctor.unfinished_files()]
        return [each.repaired() for each in found] if fix else found

    def only(self, level: str, text: str, **options: bool) -> Finding:
        """The one thing that there is to say."""
        found = self.findings(**options)
        assert [(each.level, text in each.line()) for each in found] == [(level, True)], [
            each.line() for each in found
        ]
        return found[0]


def write_files(study: Study, ledger: Ledger, runs: Path) -> None:
    """Each complete row's folder, as its worker leaves it."""
    fingerprint = study.main.attribute(FINGERPRINT)
    asked = ledger.asked()
    for number, value in ledger.complete_values().items():
        folder = runs / ledger.study.study_name / f"{number:05d}"
        folder.mkdir(parents=True, exist_ok=True)
        identity = study.task(ledger, asked[number]).identity(fingerprint)
        (folder / IDENTITY).write_text(json.dumps(identity, sort_keys=True))
        (folder / RESULT).write_text(json.dumps({"value": value}))
        (folder / "student.safetensors").write_bytes(b"0")


def made(url: str, runs: Path) -> Patient:
    """Baselines and two of six trials are complete."""
    search(url, TRIALS, study=keeping_one(2))
    study = Study.create(url, keeping_one(6))
    for ledger in study.ledgers:
        write_files(study, ledger, runs)
    patient = Patient(url, runs)
    (patient.folder(0) / "student.safetensors").unlink()
    return patient


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """A healthy study in a file, and its runs, to be copied."""
    runs = tmp_path_factory.mktemp("original") / "runs"
    made(f"sqlite:///{runs}/bdense.db", runs)
    return runs


@pytest.fixture
def patient(tmp_path, monkeypatch, original) -> Patient:
    """A healthy study."""
    runs = tmp_path / "runs"
    shutil.copytree(original, runs)
    monkeypatch.setenv("BDENSE_RUNS", str(runs))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return Patient(resolve_storage_url(None), runs)


def test_nothing_is_said_against_a_healthy_study(patient):
    assert patient.findings() == []


# A study's rows and files: how each is broken, what is said of it, and whether it is repaired.


def lease_ended_elsewhere(patient: Patient) -> None:
    """Its worker is on another machine, so the clock alone tells."""
    patient.take()
    patient.sql(
        "UPDATE bdense_lease SET host = 'box-7', boot = 'b', pid = 7, expires = expires - 1000"
    )


def never_taken(patient: Patient) -> None:
    patient.trials.study.ask(search_space(patient.study.spec))


def other_conditions(patient: Patient) -> None:
    number = patient.finish()
    patient.sql(
        "UPDATE trial_user_attributes SET value_json = '\"feed\"' WHERE key = 'fingerprint' AND "
        f"trial_id = (SELECT trial_id FROM trials JOIN studies USING (study_id) WHERE number = "
        f"{number} AND study_name = 'digits')"
    )


def other_versions(patient: Patient) -> None:
    for number in (0, 1):
        patient.sql(
            "INSERT INTO trial_user_attributes (trial_id, key, value_json) SELECT trial_id, "
            f"'versions', '{{\"torch\": \"2.1{number}.0\"}}' FROM trials JOIN studies USING "
            f"(study_id) WHERE number = {number} AND study_name = 'digits'"
        )


def spec_of_another_version(patient: Patient) -> None:
    study = patient.trials.study
    stored = json.loads(study.user_attrs[SPEC]) | {"wings": 2}
    study.set_user_attr(SPEC, json.dumps(stored))


def fingerprint_of_another(patient: Patient) -> None:
    patient.trials.study.set_user_attr(FINGERPRINT, "feedfeedfeedfeed")


def student_lost(patient: Patient) -> None:
    (patient.folder(1) / "student.safetensors").unlink()


def result_lost(patient: Patient) -> None:
    (patient.folder(1) / RESULT).unlink()


def result_changed(patient: Patient) -> None:
    (patient.folder(1) / RESULT).write_text(json.dumps({"value": 1.0}))


def picture_lost(patient: Patient) -> None:
    claim = patient.take()
    picture = patient.runs / "samples.png"
    picture.write_bytes(b"0")
    attach(open_storage(patient.url), claim.trial_id, [picture], artifact_store())
    complete(patient.study, patient.trials, claim, 9.5)
    write_files(patient.study, patient.trials, patient.runs)
    assert patient.findings() == []
    (stored,) = (patient.runs / "artifacts").iterdir()
    stored.unlink()


def checkpoints_left(patient: Patient) -> None:
    for name in (CHECKPOINT, "00004.training.safetensors"):
        (patient.folder(0) / name).write_bytes(b"0" * 2**20)


MENDED, LEFT = True, False


@pytest.mark.parametrize(
    ("broken", "level", "said", "mended"),
    [
        (lease_ended_elsewhere, "warning", "box-7:7 (attempt 1) has not renewed", MENDED),
        (never_taken, "warning", "trial 2: was never taken by a worker", LEFT),
        (other_conditions, "problem", "row 2 measured under other conditions", LEFT),
        (other_versions, "warning", "torch differs between trials: 2.10.0 in 1, 2.11.0", LEFT),
        (fingerprint_of_another, "problem", "would be refused as a worker", LEFT),
        (spec_of_another_version, "problem", "cannot read the study's spec", LEFT),
        (student_lost, "problem", "row 1 without its student's file", LEFT),
        (result_lost, "problem", "row 1 without result.json", LEFT),
        (result_changed, "problem", "row 1 without result.json, or with another FID", LEFT),
        (picture_lost, "warning", "row 2 with pictures that are not in ", LEFT),
        (checkpoints_left, "warning", "2 checkpoints and unfinished files, 2.0 MiB", MENDED),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_a_broken_study(patient, broken: Callable[[Patient], None], level, said, mended):
    broken(patient)
    found = {each.line() for each in patient.findings()}
    assert any(line.startswith(level) and said in line for line in found), found
    assert len({each.check for each in patient.findings()}) == 1
    before = sorted(patient.runs.rglob("*.*"))
    after = patient.findings(fix=True)
    if mended:
        assert [each.level for each in after] == ["mended"]
        assert patient.findings() == []
    else:
        assert {each.line() for each in after} == found
        assert sorted(patient.runs.rglob("*.*")) == before


def test_a_student_that_was_gone_before_it_was_named_is_no_problem(patient):
    """A confirmation names its candidates, which may lie behind the best that are kept."""
    (patient.folder(0) / "student.safetensors").unlink(missing_ok=True)
    keep_too(patient.trials, [0])
    assert patient.findings() == []


def test_unfinished_files_are_deleted_unless_they_are_fresh(patient):
    old, fresh = (patient.folder(0) / f".{CHECKPOINT}.{name}.partial" for name in ("x1", "x2"))
    for path in (old, fresh):
        path.write_bytes(b"0" * 2**20)
    os.utime(old, (0, 0))
    (found,) = doctor.unfinished_files()
    assert found.text.startswith(f"1 checkpoints and unfinished files, 1.0 MiB, as {old}")
    found.repair()
    assert list(doctor.unfinished_files()) == []
    assert (old.exists(), fresh.exists()) == (False, True)


def test_a_study_half_made(patient):
    optuna.create_study(study_name="cut-short", storage=open_storage(patient.url))
    (found,) = examine_study(patient.url, "cut-short")
    assert (found.level, found.study) == ("warning", "cut-short")


def test_the_runs_of_another_machine(patient, monkeypatch, tmp_path):
    monkeypatch.setenv("BDENSE_RUNS", str(tmp_path / "elsewhere"))
    found = patient.findings()
    assert [each.study for each in found] == ["digits", "digits.baselines"]
    assert all("none of 2 complete rows has files here" in each.text for each in found)


WORKER = """
import sys, time
from pathlib import Path
from tests.test_doctor import Patient
patient = Patient(sys.argv[1], Path(sys.argv[2]))
with patient.trials.holding(patient.take()):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_dead_workers_trial_is_freed_and_a_live_ones_is_not(patient):
    arguments = [sys.executable, "-c", WORKER, patient.url, str(patient.runs)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout.readline() == "held\n"
        assert patient.findings(fix=True) == []
        assert len(lease_rows(patient.url)) == 1
        worker.send_signal(signal.SIGKILL)
    assert f":{worker.pid} (attempt 1) is dead" in patient.only("warning", "is dead").text
    patient.only("mended", "is dead", fix=True)
    assert patient.findings() == []
    claim = patient.take()
    assert (claim.number, claim.attempt, claim.adopted) == (2, 2, True)


def test_a_lease_that_was_taken_meanwhile_stays(patient):
    lease_ended_elsewhere(patient)
    (found,) = patient.findings()
    assert patient.take().adopted
    found.repair()
    with open_storage(patient.url).engine.connect() as connection:
        lease = connection.execute(sa.select(LEASE)).one()
    assert (lease.attempt, lease.expires > 0) == (2, True)


def test_a_checkpoint_of_another_databases_row_stays(patient):
    """Its study has the same name, and its worker moved our folder aside."""
    checkpoints_left(patient)
    mark = patient.folder(0) / IDENTITY
    stored = json.loads(mark.read_text())
    for theirs in ({"params": {"a": 0.1}}, {"fingerprint": "feedfeedfeedfeed"}):
        mark.write_text(json.dumps(stored | theirs))
        assert patient.findings(fix=True) == []
        assert (patient.folder(0) / CHECKPOINT).exists()


@pytest.mark.slow
def test_ten_thousand_trials_and_their_folders_take_seconds(patient):
    from benchmarks.large_study import fill

    large = keeping_one(10_000, name="large")
    study = Study.create(patient.url, large)
    fill(study, open_storage(patient.url), large, 10_000)
    write_files(study, study.search, patient.runs)
    (patient.runs / "large" / "04321" / RESULT).write_text(json.dumps({"value": 0}))
    begun = time.monotonic()
    found = [each.line() for each in examine_study(patient.url, "large")]
    assert any("row 4321 without result.json, or with another FID" in line for line in found)
    assert time.monotonic() - begun < 45


# A storage and a machine.


def stored(url: str) -> list[Finding]:
    """What there is to say of a storage."""
    storage = open_reading(url)
    found = [
        (name, each) for name, check in doctor.STORAGE.items() for each in check(url, storage)
    ]
    return [replace(each, check=name) for name, each in found if each.level != "ok"]


@pytest.mark.parametrize(
    ("statement", "advice"),
    [
        ("UPDATE alembic_version SET version_num = 'v3.0.0.d'", "storage upgrade"),
        ("UPDATE bdense_schema SET version = 0", "storage upgrade"),
        ("UPDATE bdense_schema SET version = 99", "update bdense here"),
    ],
)
def test_tables_of_another_version(patient, statement, advice):
    patient.sql(statement)
    problems = [each for each in examine(patient.url, None) if each.level == "problem"]
    assert [advice in each.text for each in problems] == [True]


def test_a_file_that_is_no_database(tmp_path, monkeypatch):
    monkeypatch.setenv("BDENSE_RUNS", str(tmp_path))
    path = tmp_path / "study.db"
    for text in (None, "notes of mine, and no database at all"):
        if text is not None:
            path.write_text(text)
        (found,) = [e for e in examine(f"sqlite:///{path}", None) if e.level == "problem"]
        assert found.check == "storage"
        assert path.exists() == (text is not None)


@pytest.mark.postgres
def test_a_server_its_clock_and_a_user_that_may_only_read(postgres, tmp_path, monkeypatch):
    monkeypatch.setenv("BDENSE_RUNS", str(tmp_path))
    patient = made(resolve_storage_url(postgres.new_database()), tmp_path)
    assert stored(patient.url) == []
    assert patient.findings() == []
    lease_ended_elsewhere(patient)
    role = f"reader_{os.getpid()}"
    patient.sql(f"CREATE ROLE {role} LOGIN")
    patient.sql(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}")
    reader = make_url(patient.url).set(username=role).render_as_string(hide_password=False)
    (found,) = stored(reader)
    assert (found.check, found.level) == ("rights", "problem")
    assert found.text.startswith(f"user {role} lacks INSERT on ")
    # Whoever may only read is told what the repair lacks.
    patient.sql("UPDATE bdense_server SET seen = seen - 1000")  # it has served for long
    Patient(reader, tmp_path).only("problem", "repairing failed: ", fix=True)
    patient.only("mended", "box-7:7", fix=True)


def test_a_full_disk_and_one_that_cannot_be_written(tmp_path, monkeypatch):
    with small_disk(tmp_path / "disk", 512) as disk:
        monkeypatch.setenv("BDENSE_RUNS", str(disk.place))
        found = list(doctor.disks())
        assert [each.level for each in found] == ["problem", "problem"]
        assert "GiB free for runs" in found[0].text
        disk.make_read_only()
        assert "runs cannot be written" in next(doctor.disks()).text


# The command.


def test_the_command_says_all_and_exits_by_it(patient, monkeypatch):
    monkeypatch.setenv("BDENSE_STORAGE", patient.url)
    checkpoints_left(patient)
    done = command("doctor", "digits", "--json")
    answer = json.loads(done.out)
    assert (done.status, answer["ok"]) == (0, True)
    assert [f["check"] for f in answer["findings"] if f["level"] == "warning"] == ["leftovers"]
    result_lost(patient)
    done = command("doctor", "--fix")
    assert done.status == 1
    assert "mended   digits: leftovers: 2 checkpoints" in done.out
    assert "problem  digits: files: row 1 without result.json" in done.out
    assert "GPUs: " in done.out
    assert done.err.splitlines()[-1] == "bdense-search: 1 problem left; see above"
    assert refused(command("doctor", "nobody", "--json")).startswith("no study 'nobody' in ")


def test_a_server_and_a_cluster_that_do_not_answer(monkeypatch, tmp_path):
    monkeypatch.setenv("BDENSE_RUNS", str(tmp_path))
    monkeypatch.setenv("BDENSE_STORAGE", "postgresql://me:pw-Zq7@127.0.0.1:1/db")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    done = command("doctor")
    assert done.status == 1
    assert "problem  storage: " in done.out
    assert "problem  Ray: no Ray cluster answers at RAY_ADDRESS=127.0.0.1:1" in done.out
    assert "pw-Zq7" not in done.out + done.err
    assert "2 problems left" in done.err
