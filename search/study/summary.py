"""Where a study stands, as objects for scripts and tables for people. Reads the storage alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optuna.trial import TrialState

from search.storage.engine import redact, retrying
from search.storage.leases import SURPLUS
from search.storage.ledger import Ledger
from search.storage.reader import Counts
from search.storage.rows import StoredTrial
from search.study.study import BASELINE_RESULTS, Study
from search.study.wording import align, counts_line, weights_text

TITLES = {"sfd": "plain SFD", "uniform": "uniform weights"}
FID_KEYS = (
    "nfe",
    "images",
    "extractor",
    "extractor_sha256",
    "reference",
    "reference_images",
    "seeds",
)
# Two FIDs are compared only where these agree.
COMPARED_KEYS = ("extractor_sha256", "reference", "images", "nfe")
# Each with conditions of its own, where the study measured it.
OTHER_METRICS = ("kid", "prc")
# Where a trial's weights come from: given by (a, b), or learned.
WEIGHTS_KEYS = ("a", "b", "rule", "strength", "weights", "weights_plot")


@dataclass(frozen=True, slots=True)
class Standing:
    """One look at a study.

    Attributes:
        study: Its name.
        storage: Where it lives, without password.
        counts: Trials by state.
        best: The complete trial of lowest FID, or None.
        baselines: By method, as far as measured.
    """

    study: str
    storage: str
    counts: Counts
    best: dict[str, Any] | None
    baselines: dict[str, dict[str, Any]]

    def trials(self) -> dict[str, int]:
        """planned, complete, pruned, failed, running."""
        return trials_json(self.counts)


def standing(study: Study) -> Standing:
    """Look at a study and its baselines."""
    return Standing(
        study=study.name,
        storage=redact(study.url),
        counts=study.trials.counts(),
        best=_best(study.trials),
        baselines=baseline_results(study),
    )


def trials_json(counts: Counts) -> dict[str, int]:
    """planned, complete, pruned, failed, running."""
    return {
        "planned": counts.planned,
        "complete": counts.complete,
        "pruned": counts.pruned,
        "failed": counts.failed,
        "running": counts.running,
    }


def status_json(now: Standing) -> dict[str, Any]:
    """What ``status --json`` prints."""
    return {"study": now.study, "trials": now.trials()}


def best_json(now: Standing) -> dict[str, Any]:
    """What ``best --json`` prints."""
    return {
        "study": now.study,
        "storage": now.storage,
        "trials": now.trials(),
        "best": now.best,
        "baselines": now.baselines,
    }


def baseline_results(study: Study) -> dict[str, dict[str, Any]]:
    """The complete baselines of a study: method -> FID and its conditions."""
    if study.baselines is None:
        return {}
    results = {}
    for trial in study.baselines.rows(TrialState.COMPLETE):
        results[trial.params["method"]] = _fid_of(trial) | {
            "weights": trial.user_attrs["weights"],
            "number": trial.number,
        }
    return {method: results[method] for method in TITLES if method in results}


def complete_trials(study: Study) -> list[dict[str, Any]]:
    """Number, weights and FID with its conditions of each complete trial, in order."""
    return [_complete(trial) for trial in study.trials.rows(TrialState.COMPLETE)]


def copy_baselines(study: Study) -> None:
    """Store the baselines in the study's own attributes, where the dashboard shows them."""
    results, record = baseline_results(study), study.trials.study
    if results and retrying(lambda: record.user_attrs).get(BASELINE_RESULTS) != results:
        retrying(lambda: record.set_user_attr(BASELINE_RESULTS, results))


def table(now: Standing) -> str:
    """The study's result for people: baselines, the best trial, and what their FIDs mean."""
    return "\n".join([*align(table_rows(now)), *remarks(now)])


def table_rows(now: Standing) -> list[tuple[str, ...]]:
    """A header, then baselines and the best trial, as cells."""
    best = now.best
    learned = best is not None and "rule" in best
    of_weights = ("rule", "strength", "final w_1 .. w_K") if learned else ("a", "b", "w_1 .. w_K")
    rows: list[tuple[str, ...]] = [("", "FID", "vs plain SFD", *of_weights)]
    plain = now.baselines.get("sfd")
    for method, title in TITLES.items():
        if method in now.baselines:
            result = now.baselines[method]
            weights = weights_text(result["weights"]) if method == "uniform" else "end point alone"
            if method == "uniform":
                where = ("any", "0") if learned else ("0", "0")
            else:
                where = ("-", "-")
            cells = (title, f"{result['fid']:.3f}", gain(result, plain))
            rows.append((*cells, *where, weights))
    if best is not None:
        title = f"best of {now.counts.complete} (trial {best['number']})"
        rows.append(
            (
                title,
                f"{best['fid']:.3f}",
                gain(best, plain),
                *_where(best),
                weights_text(best["weights"]),
            )
        )
    return rows


def remarks(now: Standing) -> list[str]:
    """What the table's FIDs mean, and what not."""
    lines, best = [], now.best
    if best is not None and not best["confirmed"]:
        lines.append(
            "The best is the lowest of several noisy values from one training seed: "
            "best of n, not confirmed."
        )
    shown = [*now.baselines.values(), *([best] if best is not None else [])]
    if differing := sorted({key for result in shown for key in _differing(result, shown[0])}):
        lines.append(
            f"These FIDs were measured under different conditions ({', '.join(differing)}): no "
            "comparison where they differ."
        )
    measured = best or next(iter(now.baselines.values()), None)
    if measured is not None:
        lines.append(
            f"FID: {measured['images']} images at NFE {measured['nfe']}, features of "
            f"{measured['extractor']}, against {measured['reference']}."
        )
    return lines


def headline(now: Standing) -> str:
    """Counts on one line."""
    return f"study {now.study}: {counts_line(now.counts, 'trials')}"


def failures(study: Study) -> list[str]:
    """A line for each failed baseline and trial, with its reason."""
    ledgers = (study.baselines, study.trials)
    return [line for ledger in ledgers if ledger is not None for line in failed_rows(ledger)]


def failed_rows(ledger: Ledger, what: str = "trial") -> list[str]:
    """A line for each failed row of a ledger that counts as one, with its reason."""
    lines = []
    for trial in ledger.rows(TrialState.FAIL):
        method = trial.params.get("method")
        # A baseline that failed was tried again by the next launch.
        if SURPLUS in trial.user_attrs or (method and method in _complete_methods(ledger)):
            continue
        arm = trial.user_attrs.get("arm")
        title = TITLES[method] if method else f"{what} {trial.number}"
        title += f" ({arm}, seed {trial.params['seed']})" if arm else ""
        reason, error = (trial.user_attrs.get(key, "") for key in ("reason", "error"))
        lines.append(f"{title} failed, {reason or 'unknown'}: {error}")
    return lines


def _complete_methods(ledger: Ledger) -> set[str]:
    return {trial.params["method"] for trial in ledger.rows(TrialState.COMPLETE, ())}


def _best(ledger: Ledger) -> dict[str, Any] | None:
    trial = ledger.best()
    if trial is None:
        return None
    return _complete(trial) | {"confirmed": False, "student": trial.user_attrs["student"]}


def _complete(trial: StoredTrial) -> dict[str, Any]:
    attrs = trial.user_attrs
    weights = {key: attrs[key] for key in WEIGHTS_KEYS if key in attrs}
    return {"number": trial.number, **weights, **_fid_of(trial)}


def _fid_of(trial: StoredTrial) -> dict[str, Any]:
    stored: Mapping[str, Any] = trial.user_attrs["fid"]
    others = {key: trial.user_attrs[key] for key in OTHER_METRICS if key in trial.user_attrs}
    return {"fid": trial.value, **{key: stored[key] for key in FID_KEYS}, **others}


def gain(result: Mapping[str, Any], plain: Mapping[str, Any] | None) -> str:
    """Against plain SFD, in per cent, where the two can be compared."""
    if plain is None or result["fid"] == plain["fid"] or _differing(result, plain):
        return "-"
    return f"{100 * (result['fid'] / plain['fid'] - 1):+.1f} %"


def _differing(result: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What keeps two FIDs from being compared."""
    return [key for key in COMPARED_KEYS if result[key] != other[key]]


def in_short(best: Mapping[str, Any]) -> str:
    """Where in the search space the best trial lies, in a few words."""
    if "rule" in best:
        return f"{best['rule']}, strength {best['strength']:.3f}"
    return f"a {best['a']:.3f}"


def _where(best: Mapping[str, Any]) -> tuple[str, str]:
    """The same as two cells of a table."""
    if "rule" in best:
        return best["rule"], f"{best['strength']:.3f}"
    return f"{best['a']:.3f}", f"{best['b']:.3f}"
