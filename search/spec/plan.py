"""The plan of a study: which rows it has."""

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from bdense.knobs import KnobError, Knobs, knob, knobs_of
from search.spec.sections import MOST_ROWS, MOST_SEEDS, SEEDS, Member

if TYPE_CHECKING:
    from search.spec.study import StudySpec

# Short for a search of its one-shot training's best points.
ONE_SHOT_PLAN = "one-shot"


@dataclass(frozen=True, slots=True, kw_only=True)
class OneShotSpec(Knobs):
    """One student told its weights is trained first; the best points of its curve are trials."""

    length: float = knob(3.0, "length of its training, in those of a trial", above=0)
    points: int | None = knob(
        None,
        "points of the space at which it is measured, on latents that no trial is judged on",
        low=2,
        high=MOST_ROWS,
        none="13, or 16 for each coordinate of several",
    )
    best: int = knob(
        3, "points of the lowest FID that become trials, before others", low=1, high=MOST_ROWS
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ShortSpec(Knobs):
    """Short trainings inform a search at a part of a trial's cost; its surrogate chooses them."""

    length: float = knob(0.25, "share of method.kimg that one is trained for", above=0, below=1)
    trainings: int = knob(
        12,
        "most of them, on top of the trials; they have the trials' seed",
        low=1,
        high=MOST_ROWS,
    )


class Plan(Knobs, abc.ABC):
    """Which rows a study has; ``read_plan`` chooses the class by the keys that are given.

    A setting that only some plans have is declared here with the value that it has in the others.
    """

    __slots__ = ()

    # What a search adds to trials and baselines.
    one_shot: OneShotSpec | None = None
    short: ShortSpec | None = None
    replicates: int = 1
    race: int = 0
    stop: bool = False
    prior: tuple[str, ...] = ()
    # Intermediate FIDs, and what is asked at them.
    at: tuple[float, ...] = ()
    images: int | None = None
    pruner: Member | None = None
    # What differs between given arms beside their weights.
    variants: tuple[dict[str, Any], ...] = ({},)
    latents: Literal["shared", "fresh"] = "shared"

    @property
    def num_seeds(self) -> int:
        """Training seeds of all rows."""
        return self.replicates

    @abc.abstractmethod
    def num_rows(self, spec: "StudySpec") -> int:
        """Rows, the baselines of a search among them."""

    def num_kept(self, spec: "StudySpec") -> int:
        """Rows whose students stay on the disk."""
        return self.num_rows(spec)

    @abc.abstractmethod
    def conditions(self, spec: "StudySpec") -> dict[str, Any]:
        """Its part of ``StudySpec.conditions``."""

    def settings(self, spec: "StudySpec") -> list[Mapping[str, Any]]:
        """Changes of the method's settings that rows may have, and that count as conditions."""
        return []

    def check(self, spec: "StudySpec") -> None:
        """Raise a ``KnobError`` for what does not go with the rest of a study."""
        return


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchPlan(Plan):
    """Points proposed by a sampler, beside plain distillation and uniform weights."""

    trials: int = knob(help="trials in all, counting those that are done", low=1, high=MOST_ROWS)
    one_shot: OneShotSpec | None = knob(
        None,
        "ask one training for the whole curve of FIDs first; `plan: one-shot` is {one_shot: {}}, "
        "whose trials are its best points alone",
    )
    short: ShortSpec | None = knob(
        None,
        "short trainings too, {} for the defaults: while some are left, the surrogate chooses "
        "what is trained next, a short one or a trial, and at which point; then the sampler does",
    )
    replicates: int = knob(
        3,
        "training seeds of plain distillation and uniform weights, seeds.training and those after "
        "it; from 2 on a study knows its noise, and how small a difference it can tell",
        low=1,
        high=MOST_SEEDS,
    )
    race: int = knob(
        0,
        "how many of the trials are replicates: the most promising points under the further seeds "
        "of the baselines, in place of new points; needs replicates from 2 on",
        low=0,
    )
    stop: bool = knob(
        False,
        "end the search once no point could still beat the recommended arm by more than the least "
        "difference that the study can tell; needs replicates from 3 on",
    )
    prior: tuple[str, ...] = knob(
        (),
        "earlier searches in the storage: their best points are tried first, and their trials "
        "count in the surrogate, less where they disagree",
    )
    prior_other: bool = knob(
        False, "use priors of another data set, teacher, method or weight space too"
    )
    sampler: Member = knob(
        Member("TPESampler"),
        "a class of optuna.samplers and its arguments; its seed is seeds.sampler",
    )
    pruner: Member | None = knob(
        None,
        "a class of optuna.pruners and its arguments, asked at each intermediate FID; needs at, "
        "or a method of several stages",
    )
    at: tuple[float, ...] = knob(
        (),
        "fractions of the training after which the student is measured, ascending; a method of "
        "several stages is measured after each of them",
        above=0,
        below=1,
    )
    images: int | None = knob(
        None, "images drawn for each intermediate FID", low=2, none="evaluation.images"
    )

    def __post_init__(self) -> None:
        Knobs.__post_init__(self)
        if self.one_shot is not None and self.trials < self.one_shot.best:
            raise KnobError(
                "trials",
                f"{self.trials} are fewer than the best points of the one-shot search, "
                f"one_shot.best {self.one_shot.best}; raise one or lower the other",
            )
        if list(self.at) != sorted(set(self.at)):
            raise KnobError("at", f"{list(self.at)} must ascend, each fraction once; sort it")
        if self.images is not None and not self.at:
            raise KnobError(
                "images",
                f"{self.images} are drawn at no fraction of the training; give at: [...] or drop "
                "images",
            )
        # With two seeds the least difference is 12.7 standard deviations: any search would end.
        for name, fewest in (("race", 2), ("stop", 3)):
            if getattr(self, name) and self.replicates < fewest:
                raise KnobError(
                    name,
                    f"needs the noise of several seeds, and replicates is {self.replicates}; "
                    f"raise replicates to {fewest} or more, or drop {name}",
                )
        if self.short is not None and self.one_shot is not None:
            raise KnobError(
                "short",
                "chooses the first trials, and so does one_shot; leave out one of the two",
            )
        if self.race >= self.trials:
            raise KnobError(
                "race",
                f"{self.race} of {self.trials} trials leaves no new point; lower race or raise "
                "trials",
            )

    @property
    def points(self) -> int:
        """Trials that are new points."""
        return self.trials - self.race

    def num_rows(self, spec: "StudySpec") -> int:
        return self.trials + len(spec.baselines) * self.replicates

    def changes_when_short(self, spec: "StudySpec") -> dict[str, Any] | None:
        """The settings of a resolved method in which short trainings differ; None without any.

        Raises:
            KnobError: The method has no ``kimg``.
        """
        if self.short is None:
            return None
        if "kimg" not in spec.method.options:
            raise KnobError(
                "plan.short",
                f"trains for a share of method.kimg, which {spec.method.name} does not have; "
                "leave it out",
            )
        return {"kimg": self.short.length * spec.method.options["kimg"]}

    def num_kept(self, spec: "StudySpec") -> int:
        # Both the trial of a raced point and its replicates are kept.
        short = 0 if self.short is None else self.short.trainings
        return spec.keep_students + len(spec.baselines) * self.replicates + 2 * self.race + short

    def conditions(self, spec: "StudySpec") -> dict[str, Any]:
        seeds = {"training": spec.seeds.training, "evaluation": spec.seeds.evaluation}
        return {"weights": spec.space.identity(), "seeds": seeds}


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmsPlan(Plan):
    """Given arms, each trained under each seed."""

    arms: tuple[str | dict[str, Any], ...] = knob(
        ("plain", "uniform"),
        "plain, uniform, a mapping of weight parameters (a, b; rule, strength), or {winner_of: "
        "STUDY}, another study's confirmed winner; of method command defaults, or a mapping of "
        "all its weights",
    )
    seeds: tuple[int, ...] = knob((0, 1, 2), "training seeds, the same for all arms", **SEEDS)
    variants: tuple[dict[str, Any], ...] = knob(
        ({},), "settings of the method that differ from the study's: arms are trained under each"
    )
    latents: Literal["shared", "fresh"] = knob(
        "shared",
        "shared: all rows are judged on the latents of seeds.evaluation; fresh: each seed on its "
        "own",
    )

    def __post_init__(self) -> None:
        Knobs.__post_init__(self)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise KnobError("seeds", f"{list(self.seeds)} must name one seed or more, each once")

    @property
    def num_seeds(self) -> int:
        return len(self.seeds)

    def num_rows(self, spec: "StudySpec") -> int:
        return len(self.arms) * len(self.seeds) * len(self.variants)

    def conditions(self, spec: "StudySpec") -> dict[str, Any]:
        return {"latents": "fresh" if self.latents == "fresh" else spec.seeds.evaluation}

    def settings(self, spec: "StudySpec") -> list[Mapping[str, Any]]:
        return [*self.variants, spec.confirm.method]

    def check(self, spec: "StudySpec") -> None:
        known = spec.baselines
        for arm in self.arms:
            if isinstance(arm, str) and arm not in known:
                raise KnobError(
                    "plan.arms", f"must be {', '.join(known)} or a mapping, got {arm!r}"
                )
        if spec.evaluation.images == "auto":
            raise KnobError(
                "evaluation.images", "auto is settled by the launch of a search; give a number"
            )


def read_plan(given: Any) -> Plan:  # noqa: ANN401  as YAML has it
    """The plan of a mapping, or of the word for one.

    Raises:
        InputError: It has the keys of two plans, or a wrong key or value.
    """
    given = spelt_plan(given)
    if not isinstance(given, Mapping):
        raise KnobError(
            "plan", f"must be {ONE_SHOT_PLAN} or a mapping with trials or arms, got {given!r}"
        )
    if "arms" in given:
        if others := given.keys() & (knobs_of(SearchPlan).keys() - knobs_of(ArmsPlan).keys()):
            raise KnobError(
                "plan",
                f"has arms, which are given, and {', '.join(sorted(others))} of a search; "
                "drop one of the two",
            )
        return ArmsPlan.read_all(given)
    members = {key: given[key] for key in ("sampler", "pruner") if given.get(key) is not None}
    if given.get("one_shot") is not None and "trials" not in given:
        known = knobs_of(SearchPlan)["one_shot"].accept(given["one_shot"])
        given = {**given, "trials": known.best}
    return SearchPlan.read_all(
        {**given, **{key: Member.of(each, key) for key, each in members.items()}}
    )


def spelt_plan(given: Any) -> Any:  # noqa: ANN401  as YAML has it
    """``plan``, with a mapping in place of the word for one."""
    return {"one_shot": {}} if given == ONE_SHOT_PLAN else given
