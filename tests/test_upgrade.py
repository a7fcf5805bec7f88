"""A database and runs folder of commit 3f7be1a: refused, brought over whole, and continued."""

import contextlib
import json
import shutil
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from optuna.trial import TrialState

from bdense.errors import InputError
from bdense.files import atomic_write
from bdense.models.store import denoiser_sha256, load_denoiser
from search.errors import OutdatedStudyError, SpecChangedError
from search.spec.file import parse, read_tree
from search.spec.legacy import translated
from search.spec.resolve import resolve
from search.study import upgrade
from search.study.folders import row_folder
from search.study.study import (
    CONDITIONS,
    FINGERPRINT,
    INTERMEDIATE,
    JUDGED,
    TEACHER,
    TRAJECTORIES,
    Study,
)
from search.study.trial_log import LOG_FILE
from search.worker.result import read_result, take_folder
from search.worker.worker import Worker
from tests.conftest import EITHER
from tests.goldens import ROOT
from tests.measured import command, refused

OLD = ROOT / "tests" / "data" / "version-3f7be1a"
EXPECTED = json.loads((OLD / "expected.json").read_text())
STUDIES: dict[str, dict[str, Any]] = EXPECTED["studies"]
NAMES = [name for name in STUDIES if not name.endswith(".baselines")]
BASELINES = {"sfd": "plain", "pd": "plain", "uniform": "uniform"}
# Intermediate FIDs of progressive distillation by its steps, and by stage.
STAGES = {"8": "0", "4": "1", "2": "2"}


@pytest.fixture(autouse=True)
def at_home(tmp_path, tmp_path_factory, monkeypatch) -> None:
    """Runs and storage of each test are its own; teachers and such are made once."""
    monkeypatch.setenv("BDENSE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("BDENSE_CACHE", str(tmp_path_factory.getbasetemp() / "upgraded" / "cache"))
    for name in ("BDENSE_STORAGE", "BDENSE_ARTIFACTS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def in_one_process(monkeypatch) -> None:
    """Specs are read in this process, which has torch already."""
    monkeypatch.setattr(upgrade, "in_child", lambda call: call())


def copied(folder: Path) -> str:
    """The old runs and database; URL of the latter."""
    shutil.copytree(OLD / "runs", folder / "runs")
    shutil.copyfile(OLD / "bdense.db", folder / "runs" / "bdense.db")
    return f"sqlite:///{folder}/runs/bdense.db"


@pytest.fixture
def old(tmp_path, in_one_process) -> str:
    return copied(tmp_path)


@pytest.fixture(scope="module")
def upgraded(tmp_path_factory) -> Path:
    """Brought over, to be copied."""
    folder = tmp_path_factory.mktemp("upgraded")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BDENSE_RUNS", str(folder / "runs"))
        patch.setattr(upgrade, "in_child", lambda call: call())
        assert len(list(upgrade.upgrade_studies(copied(folder)))) == len(NAMES)
    return folder


@pytest.fixture
def url(upgraded, tmp_path, in_one_process) -> str:
    """A copy of what was brought over."""
    shutil.copytree(upgraded / "runs", tmp_path / "runs")
    return f"sqlite:///{tmp_path}/runs/bdense.db"


@pytest.fixture
def in_postgres(postgres_url, tmp_path, in_one_process) -> str:
    """The old rows in a PostgreSQL database, brought over."""
    tables, engine = sa.MetaData(), sa.create_engine(postgres_url)
    tables.reflect(engine)
    with sa.create_engine(copied(tmp_path)).connect() as old, engine.begin() as new:
        for table in tables.sorted_tables:
            rows = old.exec_driver_sql(f"SELECT * FROM {table.name}").mappings().all()
            if rows and new.execute(sa.select(table)).first() is None:
                new.execute(table.insert(), [dict(row) for row in rows])
                # New keys come after those of the rows.
                (key,) = table.primary_key.columns.keys()
                sequence = f"pg_get_serial_sequence('{table.name}', '{key}')"
                new.exec_driver_sql(f"SELECT setval({sequence}, 1000)")
        new.exec_driver_sql("UPDATE bdense_lease SET expires = 0")
    engine.dispose()
    assert len(list(upgrade.upgrade_studies(postgres_url))) == len(NAMES)
    return postgres_url


@pytest.fixture(params=EITHER)
def either_url(request) -> str:
    """What was brought over, in a database of each kind."""
    return request.getfixturevalue("url" if request.param == "sqlite" else "in_postgres")


@contextlib.contextmanager
def database(url: str) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
        yield connection
        connection.commit()


def attribute(name: str, key: str) -> Any:
    """As the old database has it."""
    with contextlib.closing(sqlite3.connect(f"file:{OLD}/bdense.db?immutable=1", uri=True)) as db:
        (value,) = db.execute(
            "SELECT value_json FROM study_user_attributes JOIN studies USING (study_id) "
            "WHERE study_name = ? AND key = ?",
            (name, key),
        ).fetchone()
    return json.loads(value)


def change(url: str, name: str, key: str, values: Mapping[str, Any]) -> None:
    """Change keys of a JSON text among an old study's attributes."""
    text = json.dumps(json.dumps({**json.loads(attribute(name, key)), **values}))
    with database(url) as db:
        db.execute(
            "UPDATE study_user_attributes SET value_json = ? WHERE key = ? AND study_id = "
            "(SELECT study_id FROM studies WHERE study_name = ?)",
            (text, key, name),
        )


def everything(url: str) -> dict[str, Any]:
    """Database and files, but for the keys that the database counts by itself."""
    found: dict[str, Any] = {}
    own = {"param_id", "study_user_attribute_id", "trial_user_attribute_id"}
    own |= {"study_system_attribute_id", "trial_system_attribute_id"}
    with database(url) as db:
        for (table,) in db.execute("SELECT name FROM sqlite_master WHERE type='table'").fetchall():
            columns = [row[1] for row in db.execute(f"PRAGMA table_info({table})")]
            chosen = ", ".join(f'"{each}"' for each in columns if each not in own)
            found[table] = sorted(map(str, db.execute(f"SELECT {chosen} FROM {table}")))
    runs = Path(url.removeprefix("sqlite:///")).parent
    for path in runs.rglob("*"):
        if path.is_file() and not path.name.startswith("bdense.db"):
            found[str(path.relative_to(runs))] = path.read_bytes()
    return found


def test_an_old_study_is_refused_by_a_line_that_names_the_command(old, monkeypatch):
    monkeypatch.setattr("search.spec.file.in_child", lambda call: call())
    assert "`bdense-search storage upgrade`" in refused(command("status", "small"))
    answer = command("launch", OLD / "small.yaml")
    assert (answer.status, answer.out) == (2, "")
    assert "`bdense-search storage upgrade`" in answer.err.splitlines()[-1]
    for name in NAMES:
        with pytest.raises(OutdatedStudyError):
            Study.open(old, name, reading=True)


def test_the_command_prints_a_line_a_study_and_all_reading_commands_say_what_they_said(tmp_path):
    copied(tmp_path)
    answer = command("storage", "upgrade")
    assert answer.status == 0, answer.err
    tables, *lines = answer.out.splitlines()
    assert [line.split()[1].rstrip(":") for line in lines] == NAMES
    for name, told in EXPECTED["status"].items():
        assert json.loads(command("status", name, "--json").out) == told
    for name, told in EXPECTED["best"].items():
        now = json.loads(command("best", name, "--json").out)
        for added in ("storage", "noise", "recommended"):
            del now[added]
        # The version of then said so of none.
        assert now["best"].pop("confirmed") is (name == "small")
        assert told["best"].pop("confirmed") is False
        assert json.dumps(now) == json.dumps(told)  # in the old order, too
    assert command("storage", "upgrade").out.splitlines() == [tables]


def test_every_row_has_its_state_parameters_figures_and_files(either_url):
    for name in NAMES:
        told, study = STUDIES[name], Study.open(either_url, name)
        assert study.main.attribute(TEACHER) == told["teacher_sha256"]
        assert study.spec.fingerprint() == study.main.attribute(FINGERPRINT)
        assert study.main.budget == told["budget"]
        rows = {ledger.study.study_name: ledger.study.trials for ledger in study.ledgers}
        assert set(rows) == {each for each in STUDIES if each in (name, f"{name}.baselines")}
        for each, trials in rows.items():
            assert len(trials) == len(STUDIES[each]["rows"])
            for trial in trials:
                same_row(study, trial, STUDIES[each]["rows"][str(trial.number)])


def to_rounding(value: Any) -> Any:
    """Compares equal where floats differ by rounding, as FIDs do on another CPU."""
    if isinstance(value, dict):
        return {key: to_rounding(each) for key, each in value.items()}
    return pytest.approx(value, rel=1e-9) if isinstance(value, float) else value


def same_row(study: Study, trial: optuna.trial.FrozenTrial, told: Mapping[str, Any]) -> None:
    """A row is what the old version said of it."""
    attrs = trial.user_attrs
    assert trial.state.name == told["state"]
    if trial.state is TrialState.COMPLETE:
        assert trial.value == to_rounding(told["fid"])
    steps = STAGES if study.spec.method.name == "progressive" else {}
    intermediate = {str(step): value for step, value in trial.intermediate_values.items()}
    before = told.get("intermediate", {})
    told_at = {steps.get(step, step): value for step, value in before.items()}
    assert intermediate == to_rounding(told_at)
    for key in ("weights", "a", "b", "rule", "strength", "tries", "reason", "error", "pruned_at"):
        assert attrs.get(key) == told.get(key), key
    assert not attrs.keys() & {"method", "kimg"}
    assert "looks_seconds" not in attrs.get("timings", {})
    if trial.state is TrialState.COMPLETE:
        assert attrs["fingerprint"] == study.spec.fingerprint()
    params = trial.system_attrs.get("fixed_params", trial.params)
    if trial.state is not TrialState.WAITING:
        assert params == trial.params
    if "arm" in told["params"]:
        assert {"variant": 0, **{k: told["params"][k] for k in ("arm", "seed")}} == params
        assert attrs["arm"] == told["arm"] == study.arms[params["arm"]].name
    elif "method" in told["params"]:
        assert study.arms[params["arm"]].baseline == BASELINES[told["params"]["method"]]
        assert (params["seed"], params["variant"]) == (study.spec.seeds.training, 0)
    else:
        assert params == told["params"]
    if (student := told.get("student")) is not None:
        path = row_folder("x", 0).parents[1] / student
        assert denoiser_sha256(load_denoiser(path)[0]) == told["student_sha256"]


@pytest.mark.parametrize("name", NAMES)
def test_a_worker_takes_each_folder_for_its_rows_and_finds_the_result(url, name):
    study = Study.open(url, name)
    folders = []
    for ledger in study.ledgers:
        for trial in ledger.study.trials:
            folder = row_folder(ledger.study.study_name, trial.number)
            if not (folder / "trial.json").exists():
                continue
            params = trial.system_attrs.get("fixed_params", trial.params)
            identity = study.task(ledger, params).identity(study.spec.fingerprint())
            take_folder(folder, identity)
            assert folder.exists()
            folders.append(folder)
            result = read_result(folder, identity)
            if trial.state is TrialState.COMPLETE:
                assert result is not None
                assert result.value == trial.value
                # The database also has what was added to the result.
                told = {key: trial.user_attrs[key] for key in result.attrs()}
                for attrs in (stored := result.attrs(), told):
                    attrs.pop("seeds"), attrs["timings"].pop("service_seconds", None)
                assert stored == told
    # Nothing was moved aside.
    assert not [each for folder in folders for each in folder.parent.glob("0*.*")]
    assert not [each for folder in folders for each in folder.glob("looks.json")]


def test_studies_of_given_arms_are_of_their_own_name_and_know_their_trajectories(url):
    found = Study.open(url, "small.confirm")
    assert (found.spec.name, found.of) == ("small.confirm", "small")
    assert (found.variants, found.main.attribute(JUDGED)) == ([{}], 0)
    assert [arm.baseline for arm in found.arms] == ["plain", "uniform", None]
    promoted = Study.open(url, "promote-small").spec.plan
    assert (promoted.seeds, promoted.latents) == ((0,), "shared")
    main = Study.open(url, "small").main
    assert main.attribute(TRAJECTORIES) == [attribute("small", "trajectories")]
    assert main.attribute(INTERMEDIATE) == attribute("small", "looks")


def test_rows_of_other_budgets_and_steps_are_variants(old):
    """The study's own settings come first, whatever the first row's; its last budget is judged."""
    of_row = "trial_id = (SELECT trial_id FROM trials WHERE study_id = 5 AND number = ?)"
    with database(old) as db:
        for number, key, value in ((0, "kimg", 6.4), (2, "nfe", 3)):
            db.execute(
                f"UPDATE trial_params SET param_value = ? WHERE param_name = ? AND {of_row}",
                (value, key, number),
            )
            db.execute(
                "UPDATE trial_system_attributes SET value_json = json_set(value_json, ?, ?) "
                f"WHERE key = 'fixed_params' AND {of_row}",
                (f"$.{key}", value, number),
            )
        db.execute("UPDATE study_user_attributes SET value_json = '6.4' WHERE key = 'kimg'")
    list(upgrade.upgrade_studies(old))
    found = Study.open(old, "small.confirm")
    assert found.variants == [{}, {"kimg": 6.4}, {"nfe": 3}]
    assert found.main.attribute(JUDGED) == 1
    rows = found.given.study.trials
    assert [row.params["variant"] for row in rows[:4]] == [1, 0, 2, 0]
    assert [row.user_attrs.get("variant") for row in rows[:3]] == [{"kimg": 6.4}, None, {"nfe": 3}]
    assert found.task(found.given, rows[0].params).variant == {"kimg": 6.4}


@pytest.mark.parametrize(
    ("name", "file"), [("small", "small"), ("learned", "learned"), ("promote-small", "promotion")]
)
def test_the_old_study_file_is_still_that_of_its_study(url, name, file):
    study = Study.open(url, name)
    path = OLD / f"{file}.yaml"
    spec = resolve(parse(translated(read_tree(path))[0], source=path.name))
    study.refuse_other_conditions(spec)
    # By it row folders are known again.
    assert spec.fingerprint() == study.main.attribute(FINGERPRINT)


def test_plots_of_then_are_gone_and_the_notes_stay(url, tmp_path):
    """The dashboard would go on showing them, while no version draws them anew."""
    shutil.copyfile(OLD / "bdense.db", tmp_path / "before.db")
    query, keys = "SELECT key FROM study_system_attributes WHERE key LIKE 'dashboard:%'", []
    for each in (f"sqlite:///{tmp_path}/before.db", url):
        with database(each) as db:
            keys.append({key for (key,) in db.execute(query)})
    plots = {key for key in keys[0] if key.startswith("dashboard:plot_data:")}
    assert plots
    assert keys[1] == keys[0] - plots


class KilledError(Exception):
    """What ends an upgrade in the middle."""


@contextlib.contextmanager
def killed_after(writes: int, monkeypatch) -> Iterator[None]:
    """Let so many files and statements be written; the next one is the last that is begun."""
    left = writes

    def write() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KilledError

    @contextlib.contextmanager
    def dying(path: Path) -> Iterator[Path]:
        with atomic_write(path) as scratch:
            write()
            yield scratch

    def execute(connection, cursor, statement, *_: object) -> None:
        if statement.split()[0] in ("INSERT", "UPDATE", "DELETE"):
            write()

    with monkeypatch.context() as patch:
        patch.setattr("bdense.files.atomic_write", dying)
        sa.event.listen(sa.Engine, "before_cursor_execute", execute)
        try:
            yield
        finally:
            sa.event.remove(sa.Engine, "before_cursor_execute", execute)


def test_killed_again_and_again_it_ends_as_if_it_had_never_been(tmp_path, url, monkeypatch):
    whole, writes, killed = everything(url), 0, 0
    again = copied(tmp_path / "again")
    monkeypatch.setenv("BDENSE_RUNS", str(tmp_path / "again" / "runs"))
    while True:
        try:
            with killed_after(writes, monkeypatch):
                list(upgrade.upgrade_studies(again))
            break
        except KilledError:
            killed, writes = killed + 1, 2 * writes + 1
        for name in NAMES:  # each study is as it was or brought over, never between
            with contextlib.suppress(OutdatedStudyError):
                assert Study.open(again, name).spec.name == name
    assert killed > 5
    assert everything(again) == whole
    assert list(upgrade.upgrade_studies(again)) == []  # twice is once
    assert everything(again) == whole


def test_a_study_that_is_worked_on_stays_as_it_is(old):
    with database(old) as db:
        # Without the boot id a dead worker cannot be recognised.
        db.execute("UPDATE bdense_lease SET boot = '', expires = 1e12 WHERE trial_id = 28")
    assert "running" in refused(command("storage", "upgrade"))
    with pytest.raises(InputError, match=r"small: rows that are running: 1"):
        list(upgrade.upgrade_studies(old))
    with pytest.raises(OutdatedStudyError):
        Study.open(old, "small")
    assert Study.open(old, "promote-small").counts().complete == 1
    with database(old) as db:
        db.execute("UPDATE bdense_lease SET expires = 0")
    assert len(list(upgrade.upgrade_studies(old))) == 1
    assert Study.open(old, "small").counts().complete == 3


def test_where_the_folders_of_interrupted_rows_are_elsewhere_it_says_so(old, tmp_path):
    shutil.move(tmp_path / "runs" / "small", tmp_path / "small")
    with pytest.raises(InputError, match="BDENSE_RUNS"):
        list(upgrade.upgrade_studies(old))
    shutil.move(tmp_path / "small", tmp_path / "runs" / "small")
    (line,) = upgrade.upgrade_studies(old)
    assert "7 row folders" in line


def test_a_folder_of_another_study_is_left_to_be_moved_aside(old, tmp_path):
    mark = tmp_path / "runs" / "small" / "00000" / "trial.json"
    mark.write_text('{"fingerprint": "0", "params": {}}')
    list(upgrade.upgrade_studies(old))
    assert mark.read_text() == '{"fingerprint": "0", "params": {}}'


def test_files_that_are_not_on_this_machine_are_those_that_were_measured_with(old):
    name, files = "second.from.small", {"data": "folder:00ff", "evaluation.reference": "11ee"}
    spec = json.loads(attribute(name, "spec"))
    spec["evaluation"] |= {"reference": "/nowhere/reference.npz"}
    teacher = {"checkpoint": "/nowhere/teacher.safetensors", "train": None}
    change(old, name, "spec", spec | {"data": "folder:/nowhere/images", "teacher": teacher})
    change(old, name, "conditions", files | {"teacher.checkpoint_sha256": "22dd"})
    list(upgrade.upgrade_studies(old))
    study = Study.open(old, name)
    conditions = json.loads(study.main.attribute(CONDITIONS))
    assert conditions.items() >= files.items()
    assert conditions["teacher.checkpoint_sha256"] == "22dd"
    assert study.spec.teacher.checkpoint == "/nowhere/teacher.safetensors"
    assert study.counts().complete == 3


def test_numbers_of_another_numerics_stay_apart_from_todays(old):
    change(old, "learned", "conditions", {"numerics": 1})
    list(upgrade.upgrade_studies(old))
    study = Study.open(old, "learned")
    with pytest.raises(SpecChangedError, match="numerics"):
        study.refuse_other_conditions(study.spec)


def test_a_spec_that_cannot_be_read_stops_no_other_study(old):
    change(old, "learned", "spec", {"weights": {"parameterisation": "magic"}})
    with pytest.raises(InputError, match=r"stay as they were: learned: .*magic"):
        list(upgrade.upgrade_studies(old))
    assert Study.open(old, "small").counts().complete == 3


def is_finished_as_before(url: str, name: str) -> None:
    """Each row that had not ended has the FID and the student of the old version."""
    study = Study.open(url, name)
    for number, told in STUDIES[name]["rows"].items():
        if "finished" not in told:
            continue
        trial, finished = study.main.study.trials[int(number)], told["finished"]
        same_row(study, trial, {**finished, "params": told["params"]})
        if "checkpoint" in told:
            lines = (row_folder(name, int(number)) / LOG_FILE).read_text().splitlines()
            events = [json.loads(line) for line in lines]
            adopted = next(i for i, each in enumerate(events) if each["event"] == "adopted")
            trained = [e["iteration"] for e in events[adopted:] if e["event"] == "training"]
            assert trained[0] == told["checkpoint"]["iteration"] + 1


def finish(url: str, name: str) -> None:
    """Work on a study to its end, in this process."""
    try:
        worker = Worker(Study.open(url, name))
    except SpecChangedError as error:
        pytest.skip(f"this machine makes another teacher than the fixture's: {error}")
    while (claimed := worker.claim()) is not None:
        worker.work(claimed)


@pytest.mark.parametrize("name", ["small", "promote-small"])
def test_interrupted_rows_go_on_from_their_checkpoints_to_the_same_students(url, name):
    finish(url, name)
    is_finished_as_before(url, name)
    if name == "small":
        now = json.loads(command("best", "small", "--json").out)
        # Its last trial, not the confirmed one, has the lowest FID in the end.
        expected = EXPECTED["finished"]["best"]["small"]
        assert {key: now[key] for key in expected} == to_rounding(expected)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("launch", OLD / "small.yaml"), "small"),
        (("promote", "small", "--to", OLD / "promotion.yaml"), "promote-small"),
    ],
)
def test_the_old_files_and_commands_run_what_they_left(url, monkeypatch, arguments, name):
    """And nothing else."""
    monkeypatch.setattr("search.spec.file.in_child", lambda call: call())
    begun = []
    monkeypatch.setattr(
        "search.run.launch.run", lambda study, *_, **__: begun.append((study.name, study.left()))
    )
    answer = command(*arguments)
    told = [row for row in STUDIES[name]["rows"].values() if "finished" in row]
    assert begun == [(name, len(told))], answer.err
