"""``storage upgrade``: studies of format 1 in today's form.

Format 1 had two kinds of specs. A search's baselines were rows of ``method``, and rows of given
arms had a budget (``kimg``) and an NFE of their own. No row, result or checkpoint is lost.

Row folders come first, each file atomically, then the database in one transaction. After an
interruption the command is repeated: it leaves what is in today's form as it is.
"""

import functools
import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from optuna.distributions import distribution_to_json
from optuna.trial import FrozenTrial, TrialState

from bdense.errors import InputError
from bdense.files import write_json
from bdense.weights.space import BASELINE, PLAIN, UNIFORM
from search.child import in_child
from search.errors import StorageError
from search.spec.contents import fingerprint_of
from search.spec.legacy import translated
from search.spec.study import StudySpec
from search.storage.engine import exclusive, retrying
from search.storage.ledger import Ledger
from search.storage.own_study import BASELINES_SUFFIX, lock_name
from search.storage.queries import asked_of
from search.storage.schema import open_tables
from search.storage.stop_flags import held
from search.storage.tables import (
    FIXED,
    INTERMEDIATE_VALUES,
    PARAMS,
    STUDIES,
    STUDY_ATTRIBUTES,
    STUDY_SYSTEM_ATTRIBUTES,
    SYSTEM_ATTRIBUTES,
    TRIALS,
    USER_ATTRIBUTES,
)
from search.study.arms import ROW_SPACE, Arm, ArmRow, Task, arms_study, baseline_arms
from search.study.folders import row_folder, study_folder
from search.study.retention import IDENTITY, INTERMEDIATE_FILE, RESULT
from search.study.study import (
    ARMS,
    BASELINE_RESULTS,
    CONDITIONS,
    CURRENT,
    FACTS,
    FINGERPRINT,
    FORMAT,
    INTERMEDIATE,
    JUDGED,
    SPEC,
    TRAJECTORIES,
    VARIANTS,
    intermediate_of,
    sibling_or_none,
)

# Names of attributes in format 1, of studies and of rows.
_KIND, _KIMG, _LOOKS, _METHOD = "kind", "kimg", "looks", "method"
_RETRAIN, _PROGRESSIVE = "retrain", "progressive"
_OLD_INTERMEDIATE_FILE = "looks.json"
_OLD_BASELINES = {"sfd": PLAIN, "pd": PLAIN, "uniform": UNIFORM}
_TIMINGS = {"looks_seconds": "intermediate_seconds"}
# Conditions kept as they were measured, not as this version or machine has them.
_MEASURED = (
    "numerics",
    "data",
    "teacher.checkpoint",
    "teacher.checkpoint_sha256",
    "evaluation.extractor",
    "evaluation.reference",
)
_OLD_PLOTS = "dashboard:plot_data:"  # of optuna-dashboard; this version stores none


def upgrade_studies(url: str) -> Iterator[str]:
    """Bring every study of format 1 to today's form.

    The row folders must be on this machine, teacher and data need not.

    Args:
        url: The storage; its tables are of this version.

    Yields:
        A line for each study.

    Raises:
        StorageError: The database cannot be used.
        InputError: Torch is missing, or some studies stay as they were, named with the reason.
    """
    engine = open_tables(url).engine
    outdated = retrying(lambda: _outdated(engine))
    if not outdated:
        return
    if importlib.util.find_spec("torch") is None:
        raise InputError(
            f"{', '.join(outdated)} are of an older form, and reading it needs torch; run this "
            "command where torch is installed and the runs folder is"
        )
    specs = in_child(
        functools.partial(_translated_all, {name: each[SPEC] for name, each in outdated.items()})
    )
    refused = []
    for name in outdated:
        found = specs[name]
        try:
            if isinstance(found, str):
                raise InputError(found)
            yield f"study {name}: {_bring_over(url, name, found)}"
        except StorageError:
            raise
        except InputError as error:
            refused.append(f"{name}: {error}")
    if refused:
        raise InputError("these studies stay as they were: " + "; ".join(refused))


def _outdated(engine: sa.Engine) -> dict[str, dict[str, Any]]:
    """The attributes of each whole study of format 1, by name; baselines go with their search."""
    query = sa.select(STUDIES.c.study_name, STUDY_ATTRIBUTES.c.key, STUDY_ATTRIBUTES.c.value_json)
    of_study = STUDY_ATTRIBUTES.c.study_id == STUDIES.c.study_id
    found: dict[str, dict[str, Any]] = {}
    with engine.connect() as connection:
        for name, key, value in connection.execute(
            query.select_from(STUDIES.join(STUDY_ATTRIBUTES, of_study))
            .where(STUDY_ATTRIBUTES.c.key.in_((SPEC, CONDITIONS, FORMAT)))
            .order_by(STUDIES.c.study_id)
        ):
            found.setdefault(name, {})[key] = json.loads(value)
    return {name: each for name, each in found.items() if each.keys() == {SPEC, CONDITIONS}}


def _translated_all(specs: Mapping[str, str]) -> dict[str, StudySpec | str]:
    """Each stored spec in today's form, or why it cannot be; needs torch."""
    from search.spec.resolve import filled_in

    found: dict[str, StudySpec | str] = {}
    for name, text in specs.items():
        try:
            spec = StudySpec.read(translated(json.loads(text))[0])
            _ = spec.space
            found[name] = filled_in(spec)
        except InputError as error:
            found[name] = f"its stored spec cannot be read: {' '.join(str(error).split())}"
    return found


def _bring_over(url: str, name: str, spec: StudySpec) -> str:
    """Rewrite one study."""
    ledger = Ledger.open(url, name, budget=None)
    baselines = sibling_or_none(ledger, name + BASELINES_SUFFIX)
    ledgers = [ledger] if baselines is None else [ledger, baselines]
    _refuse_at_work(ledgers)
    form = _Form.of(name, ledger.study.user_attrs, spec)
    _require_folders(ledgers)
    rows = [form.rows(each) for each in ledgers]
    # Outside the lock, which must not be held for minutes.
    folders = [
        _rewrite_folder(row_folder(each.name, row.trial.number), row, form)
        for each, its in zip(ledgers, rows, strict=True)
        for row in its
    ]
    retrying(functools.partial(_rewrite_database, ledgers, form))
    beside = f" and {len(rows[1])} baselines" if baselines is not None else ""
    return f"{len(rows[0])} rows{beside}, {sum(folders)} row folders, brought to format {CURRENT}"


def _rewrite_database(ledgers: Sequence[Ledger], form: "_Form") -> None:
    """All that the database holds of a study, in one transaction; twice is once."""
    main, engine = ledgers[0], ledgers[0].storage.engine
    with exclusive(engine, *(lock_name(each.name) for each in ledgers)):
        if FORMAT in main.study.user_attrs:
            return  # an earlier try was committed, only its answer was lost
        _refuse_at_work(ledgers)
        rows = [form.rows(each) for each in ledgers]
        with engine.begin() as connection:
            for each, its in zip(ledgers, rows, strict=True):
                plots = STUDY_SYSTEM_ATTRIBUTES.c.key.startswith(_OLD_PLOTS, autoescape=True)
                mine = STUDY_SYSTEM_ATTRIBUTES.c.study_id == each.key
                connection.execute(sa.delete(STUDY_SYSTEM_ATTRIBUTES).where(mine, plots))
                _rewrite_rows(connection, each.key, its, form)
                if each is not main:
                    arms = [asdict(arm) for arm in form.arms]
                    _set(connection, STUDY_ATTRIBUTES, each.key, {ARMS: arms, VARIANTS: [{}]})
            _drop(connection, STUDY_ATTRIBUTES, main.key, (_KIND, _KIMG, _LOOKS))
            _set(connection, STUDY_ATTRIBUTES, main.key, {**form.attributes(), FORMAT: CURRENT})


def _refuse_at_work(ledgers: Sequence[Ledger]) -> None:
    if working := held(ledgers):
        raise InputError(
            f"rows that are running: {working}; end the workers, then run this command again"
        )


def _require_folders(ledgers: Sequence[Ledger]) -> None:
    """Refuse a study whose interrupted rows would lose their checkpoints."""
    for ledger in ledgers:
        folder = study_folder(ledger.name)
        if ledger.counts().running and not folder.is_dir():
            raise InputError(
                f"it has interrupted rows, and their folder {folder} is not here; run this "
                "command where the runs are (BDENSE_RUNS), or make that folder to start these "
                "rows anew"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """One row in both forms.

    Attributes:
        trial: As it is stored.
        params: In today's form, as planned.
        before: The identity in its folder.
        task: In today's form.
    """

    trial: FrozenTrial
    params: dict[str, Any]
    before: dict[str, Any]
    task: Task


@dataclass(frozen=True, slots=True, kw_only=True)
class _Form:
    """A study in both forms.

    Attributes:
        old: Its attributes in format 1.
        spec: Today's.
        conditions: Of the spec, as they were measured.
        variants: Of the rows, by their kimg and nfe.
    """

    name: str
    old: Mapping[str, Any]
    spec: StudySpec
    conditions: dict[str, Any]
    variants: list[dict[str, Any]]

    @classmethod
    def of(cls, name: str, old: Mapping[str, Any], spec: StudySpec) -> "_Form":
        """A study, from its attributes of format 1 and its spec in the new form."""
        if old.get(_KIND) == _RETRAIN:
            spec = arms_study(spec, name)
        measured = json.loads(old[CONDITIONS])
        known = {key: measured[key] for key in _MEASURED if measured.get(key) is not None}
        # 0 is a version before numerics were counted; it compares with none.
        conditions = {**spec.conditions(known), "numerics": measured.get("numerics", 0)}
        return cls(name=name, old=old, spec=spec, conditions=conditions, variants=[{}])

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the new conditions."""
        return fingerprint_of(self.conditions)

    @property
    def arms(self) -> list[Arm]:
        """Given arms; of a search its baselines."""
        if _KIND not in self.old:
            return baseline_arms(self.spec)
        stored = [Arm(**each) for each in self.old.get(ARMS, [])]
        return [replace(arm, params=_arm_params(arm.params)) for arm in stored]

    def rows(self, ledger: Ledger) -> list[_Row]:
        """The rows of one of its ledgers."""
        trials = retrying(lambda: ledger.study.get_trials(deepcopy=False))
        is_search = _KIND not in self.old and ledger.name == self.name
        return [self._trial(each) if is_search else self._given(each) for each in trials]

    def variant(self, kimg: float, nfe: int) -> dict[str, Any]:
        """Settings of the method that differ from the study's own."""
        own = self.spec.method.options
        asked = {"nfe": nfe, "kimg": kimg}
        return {key: value for key, value in asked.items() if own.get(key) != value}

    def attributes(self) -> dict[str, Any]:
        """Today's, except the format; call ``rows`` first, which makes the variants."""
        old = self.old
        found: dict[str, Any] = {
            CONDITIONS: json.dumps(self.conditions),
            FINGERPRINT: self.fingerprint,
            SPEC: json.dumps(self.spec.as_dict()),
        }
        if isinstance(folder := old.get(TRAJECTORIES), str):
            found[TRAJECTORIES] = [folder]
        if _KIND in old:
            found |= {ARMS: [asdict(arm) for arm in self.arms], VARIANTS: self.variants}
            # A promotion's facts had its weights, too, which are in its arm.
            found[FACTS] = {"of": old.get(FACTS, {}).get("of")}
            if (kimg := old.get(_KIMG)) is not None:
                judged = self.variant(kimg, self.spec.method.options["nfe"])
                found[JUDGED] = self._index(judged)
            return found
        if BASELINE_RESULTS in old:
            results = old[BASELINE_RESULTS].items()
            found[BASELINE_RESULTS] = {_OLD_BASELINES[name]: each for name, each in results}
        if _LOOKS in old and (intermediate := intermediate_of(self.spec)) is not None:
            found[INTERMEDIATE] = {**intermediate, **old[_LOOKS]}
        return found

    def _trial(self, trial: FrozenTrial) -> _Row:
        """A point of a search, whose parameters stay."""
        params, seeds = asked_of(trial), self.spec.seeds
        task = Task(params=params, seed=seeds.training, latents=seeds.evaluation)
        before = {"params": params, "fingerprint": self.old[FINGERPRINT]}
        return _Row(trial=trial, params=params, before=before, task=task)

    def _given(self, trial: FrozenTrial) -> _Row:
        """A row of a given arm, or a baseline."""
        asked, seeds, kind = asked_of(trial), self.spec.seeds, self.old.get(_KIND)
        if asked.keys() == ROW_SPACE.keys():
            raise InputError("another command is upgrading it; run this one again")
        arms, variant = self.arms, {}
        before: dict[str, Any] = {"fingerprint": self.old[FINGERPRINT]}
        if kind is None:
            index = (PLAIN, UNIFORM).index(_OLD_BASELINES[asked[_METHOD]])
            seed, latents = seeds.training, seeds.evaluation
            before["params"] = {_METHOD: asked[_METHOD]}
        else:
            index, seed, latents = asked["arm"], asked["seed"], seeds.evaluation
            before["params"] = self.old[ARMS][index]["params"]
        if kind == _PROGRESSIVE:
            before["seed"] = seed
        if kind == _RETRAIN:
            latents, kimg, nfe = seed, asked["kimg"], asked["nfe"]
            variant = self.variant(kimg, nfe)
            own = {"seeds.training": seed, "seeds.evaluation": seed}
            own |= {"budget.kimg": kimg, "student.nfe": nfe}
            before["fingerprint"] = fingerprint_of({**json.loads(self.old[CONDITIONS]), **own})
        row = ArmRow(arm=index, seed=seed, variant=self._index(variant))
        task = Task(
            params=arms[index].params,
            seed=seed,
            latents=latents,
            variant=variant,
            arm=arms[index].name,
        )
        return _Row(trial=trial, params=asdict(row), before=before, task=task)

    def _index(self, variant: dict[str, Any]) -> int:
        if variant not in self.variants:
            self.variants.append(variant)
        return self.variants.index(variant)


def _arm_params(old: dict[str, Any]) -> dict[str, Any]:
    return {BASELINE: _OLD_BASELINES[old[_METHOD]]} if _METHOD in old else old


def _result_attrs(old: Mapping[str, Any], row: _Row, fingerprint: str) -> dict[str, Any]:
    """Attributes of a row or its result file in today's form."""
    found = {key: value for key, value in old.items() if key not in (_METHOD, _KIMG)}
    if row.task.arm is not None:
        found["arm"] = row.task.arm
    if FINGERPRINT in found:
        found[FINGERPRINT] = fingerprint
        if row.task.variant:
            found["variant"] = dict(row.task.variant)
    if "timings" in found:
        timings = found["timings"].items()
        found["timings"] = {_TIMINGS.get(key, key): seconds for key, seconds in timings}
    return found


def _rewrite_folder(folder: Path, row: _Row, form: _Form) -> bool:
    """Rewrite a folder if it is the row's; returns whether it is."""
    identity = row.task.identity(form.fingerprint)
    mark = folder / IDENTITY
    if not mark.is_file() or json.loads(mark.read_text()) not in (row.before, identity):
        return False
    old = folder / _OLD_INTERMEDIATE_FILE
    if old.exists():
        write_json(folder / INTERMEDIATE_FILE, json.loads(old.read_text()))
        old.unlink()
    for path in folder.glob("*.fid.json"):
        _rewrite(path, lambda stored: stored if "fid" in stored else {"fid": stored})

    def result(stored: dict[str, Any]) -> dict[str, Any]:
        attrs = _result_attrs(stored["attrs"], row, form.fingerprint)
        ours = stored["identity"] == row.before
        return {**stored, "attrs": attrs, "identity": identity} if ours else stored

    if (folder / RESULT).exists():
        _rewrite(folder / RESULT, result)
    # Last: with it the folder is in today's form. ``take_folder`` compares it.
    _rewrite(mark, lambda _: identity)
    return True


def _rewrite(path: Path, change: Callable[[Any], Any]) -> None:
    stored = json.loads(path.read_text())
    if (changed := change(stored)) != stored:
        write_json(path, changed, sort_keys=path.name == IDENTITY)


def _rewrite_rows(connection: sa.Connection, key: int, rows: Iterable[_Row], form: _Form) -> None:
    """Rewrite the rows of the study of that key."""
    query = sa.select(TRIALS.c.number, TRIALS.c.trial_id).where(TRIALS.c.study_id == key)
    keys = {row.number: row.trial_id for row in connection.execute(query)}
    for row in rows:
        trial, trial_id = row.trial, keys[row.trial.number]
        attrs = _result_attrs(trial.user_attrs, row, form.fingerprint)
        old = trial.user_attrs
        _drop(connection, USER_ATTRIBUTES, trial_id, old.keys() - attrs.keys())
        new = {name: value for name, value in attrs.items() if old.get(name) != value}
        _set(connection, USER_ATTRIBUTES, trial_id, new)
        if row.task.arm is not None:
            _rewrite_params(connection, row, trial_id)
        if len(form.spec.resolved.stages) > 1:
            _renumber_stages(connection, row, trial_id, form.spec)


def _rewrite_params(connection: sa.Connection, row: _Row, trial_id: int) -> None:
    """The row's parameters, as planned and as begun."""
    if FIXED in row.trial.system_attrs:
        _set(connection, SYSTEM_ATTRIBUTES, trial_id, {FIXED: row.params})
    if row.trial.state is TrialState.WAITING:
        return
    connection.execute(sa.delete(PARAMS).where(PARAMS.c.trial_id == trial_id))
    connection.execute(
        sa.insert(PARAMS),
        [
            {
                "trial_id": trial_id,
                "param_name": name,
                "param_value": float(row.params[name]),
                "distribution_json": distribution_to_json(distribution),
            }
            for name, distribution in ROW_SPACE.items()
        ],
    )


def _renumber_stages(connection: sa.Connection, row: _Row, trial_id: int, spec: StudySpec) -> None:
    """Number FIDs by stage instead of by steps; 0 is the teacher."""
    places = {stage.nfe: index for index, stage in enumerate(spec.resolved.stages, 1)}
    step, mine = INTERMEDIATE_VALUES.c.step, INTERMEDIATE_VALUES.c.trial_id == trial_id
    for old in row.trial.intermediate_values:
        # Negative at first, as a new number may be another's old one.
        new = -1 - places.get(old, 0)
        connection.execute(
            sa.update(INTERMEDIATE_VALUES).where(mine, step == old).values(step=new)
        )
    connection.execute(sa.update(INTERMEDIATE_VALUES).where(mine, step < 0).values(step=-1 - step))


def _set(
    connection: sa.Connection, table: sa.TableClause, of: int, values: Mapping[str, Any]
) -> None:
    """Replace attributes of a study or a trial."""
    _drop(connection, table, of, values)
    owner = _owner(table).name
    for name, value in values.items():
        row = {owner: of, "key": name, "value_json": json.dumps(value)}
        connection.execute(sa.insert(table).values(row))


def _drop(connection: sa.Connection, table: sa.TableClause, of: int, names: Iterable[str]) -> None:
    if names := sorted(names):
        connection.execute(sa.delete(table).where(_owner(table) == of, table.c.key.in_(names)))


def _owner(table: sa.TableClause) -> sa.ColumnClause[Any]:
    """The column of the study or trial that an attribute belongs to."""
    column: sa.ColumnClause[Any] = table.c[0]
    return column
