"""Seconds until a search is within 2 % of the best, with and without pruning.

Two searches of the same points are run in full, each in this process: one that looks at every
trial on its way and ends none, and one that prunes. The first knows what each trial costs and
shows up to each look, so that the same points are then searched again in many orders without
training: how soon a good one comes is luck, which one order would measure more than the pruner.
"""

import argparse
import functools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.trial import TrialState
from search.spec.study_file import read_spec
from search.spec.study_spec import PruningSpec, SamplerSpec, StudySpec
from search.worker.engine import check, excess_weight
from search.worker.trial import bring_to_an_end, train_and_measure

from benchmarks.common import DIGITS_STUDY, parser, publish, table
from search.spec.space import make_pruner, make_sampler, search_space
from search.storage.engine import cache_folder
from search.storage.ledger import Claim, Holding, Ledger
from search.study.trial_log import TrialLog
from search.worker.assets import Assets, load, prepare, use_device
from search.worker.pruning import is_poor, judge_of

AT = (0.25, 0.5)
WITHIN = 0.02
RUN = ("median",)  # in full, too
PRUNERS = (*RUN, "percentile", "successive-halving", "hyperband")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One point's student, trained to its end.

    Attributes:
        params: The point.
        fid: At its end.
        looks: FIDs on the way.
        training, looking, measuring, around: Seconds of the training, of all looks, of the last
            FID, and of the ledger.
    """

    params: dict[str, Any]
    fid: float
    looks: tuple[float, ...]
    training: float
    looking: float
    measuring: float
    around: float

    def seconds(self, at: Sequence[float], pruned: int | None = None, *, looked: bool) -> float:
        """What it costs: whole, or up to the look at which it was pruned."""
        if pruned is not None:
            share = self.looking * (pruned + 1) / len(at)
            return self.training * at[pruned] + share + self.around
        return self.training + self.looking * looked + self.measuring + self.around


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One search.

    Attributes:
        reached: Seconds until a complete trial was good enough; None where none was.
        seconds: Of the whole search.
        best: Its lowest FID.
        trials, pruned: How many.
    """

    reached: float | None
    seconds: float
    best: float
    trials: int
    pruned: int


def main() -> None:
    """Run, replay and print."""
    given = _given()
    spec = _spec(given)
    check(spec)
    os.environ["BDENSE_CACHE"] = str(cache_folder().resolve())
    device = use_device(spec)
    prepare(spec, device, lambda *_: None)
    assets = load(spec, device, record=True)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["BDENSE_RUNS"] = folder
        trials, real = [], {}
        for name in ("none", *RUN):
            pruned = _pruning(spec, name)
            ended, seconds = _run(replace(assets, spec=pruned), pruned, Path(folder) / name)
            sys.stderr.write(f"{name}: {seconds:.0f} s\n")
            if name == "none":
                trials = [_trial(row) for row in ended]
            real[name] = (ended, seconds)
    publish("search_pruning", _body(spec, trials, real, given.orders), write=given.write)


def _given() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument(
        "--study", type=Path, default=DIGITS_STUDY, metavar="FILE", help="default: %(default)s"
    )
    options.add_argument("--trials", type=int, default=16, help="default: %(default)s")
    options.add_argument("--kimg", type=float, help="kimg of each student (default: the study's)")
    options.add_argument(
        "--images", type=int, default=1024, help="images of a look (default: %(default)s)"
    )
    options.add_argument(
        "--orders", type=int, default=30, help="orders to search in again (default: %(default)s)"
    )
    given = options.parse_args()
    if given.trials < 10 or given.orders < 2:
        options.error("--trials needs 10, or nothing is left to prune, and --orders 2")
    return given


def _spec(given: argparse.Namespace) -> StudySpec:
    """The study by chance: the same points, whatever comes of them."""
    spec = read_spec(given.study)
    budget = spec.budget.model_dump() | {"trials": given.trials}
    budget |= {"kimg": given.kimg} if given.kimg else {}
    sampler = SamplerSpec(name="random", startup_trials=spec.sampler.startup_trials)
    images = min(given.images, spec.evaluation.images)
    tree = spec.model_dump() | {"budget": budget, "sampler": sampler.model_dump()}
    return StudySpec.model_validate(tree | {"pruning": {"at": AT, "images": images}})


def _pruning(spec: StudySpec, pruner: str) -> StudySpec:
    given = {"pruner": pruner, "at": AT, "images": spec.pruning.images}
    return spec.model_copy(update={"pruning": PruningSpec.model_validate(given)})


def _run(
    assets: Assets, spec: StudySpec, folder: Path
) -> tuple[list[optuna.trial.FrozenTrial], float]:
    """A search in this process, as a worker does it; its trials and its seconds."""
    folder.mkdir()
    name = f"{spec.name}-{folder.name}"
    ledger = Ledger.open(f"sqlite:///{folder}/study.db", name, budget=spec.budget.trials)
    space, sampler = search_space(spec), functools.partial(make_sampler, spec)
    started = time.perf_counter()
    while True:
        asked = time.perf_counter()
        claim = ledger.claim(space, sampler, functools.partial(excess_weight, spec))
        if not isinstance(claim, Claim):
            break
        judge = judge_of(spec, ledger, claim)
        params = claim.params

        def work(
            holding: Holding, place: Path, log: TrialLog, judge: Any = judge, params: Any = params
        ) -> dict[str, Any]:
            calls = {"check": holding.check, "report": holding.report, "judge": judge}
            return train_and_measure(assets, params, place, log=log, **calls)

        bring_to_an_end(ledger, claim, work, fingerprint=assets.fingerprint, asked=asked)
    seconds = time.perf_counter() - started
    ended = (TrialState.COMPLETE, TrialState.PRUNED)
    rows = [row for row in ledger.study.get_trials() if "a" in row.user_attrs]
    assert all(row.state in ended for row in rows), "a trial failed"
    return rows, seconds


def _trial(row: optuna.trial.FrozenTrial) -> Trial:
    assert row.value is not None
    seconds = row.user_attrs["timings"]
    return Trial(
        params=row.params,
        fid=row.value,
        looks=tuple(look["fid"] for look in row.user_attrs["intermediate"]),
        training=seconds["student_seconds"],
        looking=seconds["looks_seconds"],
        measuring=seconds["evaluation_seconds"],
        around=seconds["service_seconds"],
    )


def _replay(spec: StudySpec, trials: Sequence[Trial], enough: float) -> tuple[Outcome, list[Any]]:
    """Search these trials in this order with the study's pruner; and where each was pruned."""
    pruner, study = make_pruner(spec), optuna.create_study()
    steps = [after * spec.budget.batch for after in spec.looks]
    looked = spec.pruning.pruner != "none"
    seconds, reached, verdicts = 0.0, None, []
    for trial in trials:
        asked, pruned = study.ask(), None
        for rung, (step, fid) in enumerate(zip(steps, trial.looks, strict=True)):
            asked.report(fid, step)
            if is_poor(spec, pruner, study, asked.number):
                pruned = rung
                break
        seconds += trial.seconds(spec.pruning.at, pruned, looked=looked)
        verdicts.append(pruned)
        if pruned is not None:
            study.tell(asked, state=TrialState.PRUNED)
            continue
        study.tell(asked, trial.fid)
        if reached is None and trial.fid <= enough:
            reached = seconds
    outcome = Outcome(
        reached=reached,
        seconds=seconds,
        best=study.best_value,
        trials=len(trials),
        pruned=sum(verdict is not None for verdict in verdicts),
    )
    return outcome, verdicts


def _body(
    spec: StudySpec,
    trials: Sequence[Trial],
    real: dict[str, tuple[list[optuna.trial.FrozenTrial], float]],
    orders: int,
) -> str:
    best = min(trial.fid for trial in trials)
    enough = best * (1 + WITHIN)
    draws = np.random.default_rng(0)
    shuffled = [[trials[i] for i in draws.permutation(len(trials))] for _ in range(orders)]
    searches = {
        "without": [_replay(_pruning(spec, "none"), order, enough)[0] for order in shuffled]
    }
    for pruner in PRUNERS:
        pruned = _pruning(spec, pruner)
        searches[pruner] = [_replay(pruned, order, enough)[0] for order in shuffled]
        sys.stderr.write(f"{pruner}: {orders} orders\n")
    rows = [_cells(name, outcomes, best) for name, outcomes in searches.items()]
    header = [
        "search",
        f"to within {WITHIN:.0%}, s",
        "10 .. 90 % of orders",
        "reached",
        "whole, s",
        "trials",
        "pruned",
        "its best",
    ]
    good = sum(trial.fid <= enough for trial in trials)
    looks = [
        np.corrcoef([t.looks[i] for t in trials], [t.fid for t in trials])[0, 1] for i in (0, 1)
    ]
    training = spec.budget
    return f"""\
Study {spec.name} by chance: {len(trials)} points, students of {training.kimg:g} kimg at batch \
{training.batch}, FID of {spec.evaluation.images} images ({spec.evaluation.extractor}),
looks at {" and ".join(f"{at:g}" for at in AT)} of the training by {spec.pruning.images} images. \
FIDs {best:.3f} to {max(t.fid for t in trials):.3f}; {good} of the points are
within {WITHIN:.0%} of the best. Correlation of a look's FID with the last one: \
{looks[0]:.2f} and {looks[1]:.2f}.
Seconds of a trial, medians: {_medians(trials)}. Pruners at their defaults (5 trials before any is
pruned).

Run in full, in the order drawn; trials that a pruner left have the FIDs of the first search, bit \
for bit: {_same(real)}.

{_real_table(spec, trials, real, enough)}

The same points in {orders} orders, from what each cost: medians over the orders. `reached` is \
the share of orders in which a trial
within {WITHIN:.0%} was completed, `its best` the mean of the lowest FID over the lowest of all.

{table(header, rows)}
"""


def _medians(trials: Sequence[Trial]) -> str:
    parts = {
        "training": [trial.training for trial in trials],
        "both looks": [trial.looking for trial in trials],
        "the last FID": [trial.measuring for trial in trials],
        "the ledger": [trial.around for trial in trials],
    }
    return ", ".join(f"{name} {statistics.median(each):.2f}" for name, each in parts.items())


def _same(real: dict[str, tuple[list[optuna.trial.FrozenTrial], float]]) -> str:
    whole = {row.params["a"]: row.value for row in real["none"][0]}
    kept = [
        row.value == whole[row.params["a"]]
        for name in RUN
        for row in real[name][0]
        if row.state is TrialState.COMPLETE
    ]
    return "yes" if all(kept) else f"NO, {kept.count(False)} of {len(kept)} differ"


def _real_table(
    spec: StudySpec,
    trials: Sequence[Trial],
    real: dict[str, tuple[list[optuna.trial.FrozenTrial], float]],
    enough: float,
) -> str:
    rows = []
    for name, (ended, seconds) in real.items():
        outcome, _ = _replay(_pruning(spec, name), trials, enough)
        said = outcome.seconds + (sum(t.looking for t in trials) if name == "none" else 0.0)
        pruned = sum(row.state is TrialState.PRUNED for row in ended)
        lowest = min(row.value for row in ended if row.state is TrialState.COMPLETE)
        title = "looks alone" if name == "none" else name
        rows.append((title, f"{seconds:.1f}", f"{said:.1f}", len(ended), pruned, f"{lowest:.3f}"))
    header = ("search", "seconds", "from its parts", "trials", "pruned", "best FID")
    return table(header, rows)


def _cells(name: str, outcomes: Sequence[Outcome], best: float) -> list[str]:
    never = float("inf")
    reached = sorted(never if each.reached is None else each.reached for each in outcomes)
    low, high = (reached[round(share * (len(reached) - 1))] for share in (0.1, 0.9))

    def shown(seconds: float) -> str:
        return "never" if seconds == never else f"{seconds:.0f}"

    return [
        name,
        shown(statistics.median_low(reached)),
        f"{shown(low)} .. {shown(high)}",
        f"{sum(value < never for value in reached) / len(reached):.0%}",
        f"{statistics.median(each.seconds for each in outcomes):.0f}",
        f"{statistics.median(each.trials for each in outcomes):.0f}",
        f"{statistics.median(each.pruned for each in outcomes):.0f}",
        f"{statistics.mean(each.best for each in outcomes) / best - 1:+.2%}",
    ]


if __name__ == "__main__":
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    main()
