"""StudySpec: what to distil, what to search, how to judge it, what it may cost."""

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from bdense.diffusion.solver_names import SolverName, refuse_thresholding, solver_order
from search.spec.model_spec import Count, FloatRange, Kimg, ModelSpec, Positive, Seed, Strict


class SolverSpec(Strict):
    """The teacher's solver."""

    name: SolverName = "dpmpp"
    order: int | None = Field(
        default=None, validate_default=True, description="of ipndm and dpmpp; unset: the highest"
    )
    thresholding: bool = False

    @field_validator("order")
    @classmethod
    def _one_that_the_solver_has(cls, order: int | None, info: ValidationInfo) -> int | None:
        # Without a name there is a mistake to report already.
        return solver_order(info.data["name"], order) if "name" in info.data else order

    @field_validator("thresholding")
    @classmethod
    def _of_a_solver_that_has_it(cls, thresholding: bool, info: ValidationInfo) -> bool:
        if thresholding and "name" in info.data:
            refuse_thresholding(info.data["name"])
        return thresholding


class ScheduleSpec(Strict):
    """Spacing of the noise levels."""

    kind: Literal["polynomial", "logsnr", "time_uniform"] = "polynomial"
    rho: Positive = 7.0
    sigma_min: Positive = 0.006
    sigma_max: Positive = 80.0

    @model_validator(mode="after")
    def _decreasing(self) -> "ScheduleSpec":
        if self.sigma_min >= self.sigma_max:
            raise ValueError(
                f"sigma_min {self.sigma_min} must be below sigma_max {self.sigma_max}"
            )
        return self


class StudentSpec(Strict):
    """What is distilled: method, network evaluations an image, sub-steps, first step."""

    method: Literal["sfd-bdense"] = "sfd-bdense"
    nfe: Count
    substeps: Annotated[int, Field(ge=1, description="K")] = 4
    afs: bool = True
    solver: SolverSpec = Field(default_factory=SolverSpec)
    schedule: ScheduleSpec = Field(default_factory=ScheduleSpec)


# Which parameterisation has a key that another lacks: such a key is no misspelling.
_WEIGHT_KEYS = {
    "a": "log-linear or normalised",
    "b": "log-linear",
    "largest": "log-linear or normalised",
    "rules": "learned",
    "strength": "learned",
    "memory": "learned",
}


class WeightSpace(Strict):
    """Where a study looks for branch weights; the three below are the ones there are."""

    @model_validator(mode="before")
    @classmethod
    def _no_keys_of_another(cls, given: Any) -> Any:  # noqa: ANN401  as YAML has it
        for key in sorted(_WEIGHT_KEYS.keys() & set(given)) if isinstance(given, dict) else ():
            if key not in cls.model_fields:
                raise ValueError(
                    f"{given['parameterisation']} weights have no {key}; drop it or use "
                    f"{_WEIGHT_KEYS[key]}"
                )
        return given


class LogLinearSpace(WeightSpace):
    """log w_k = a k + b: the paper's."""

    parameterisation: Literal["log-linear"]
    a: FloatRange
    b: FloatRange
    largest: Positive | None = Field(
        default=None, description="bound on max_k w_k; a suggestion beyond it is not trained"
    )


class NormalisedSpace(WeightSpace):
    """log w_k = a k + b, with b such that the weights' sum is K."""

    parameterisation: Literal["normalised"]
    a: FloatRange
    largest: Positive | None = Field(default=None, description="as in log-linear")


class LearnedSpace(WeightSpace):
    """Weights that follow the student's own losses or gradients while it trains.

    Attributes:
        rules: What a branch's scale is; one or more to choose from.
        strength: Exponent of 1 / scale: 0 is uniform, 1 the rule itself, below 0 its reverse.
        memory: Updates over which an old one's share in the scale falls to 1 / e.
    """

    parameterisation: Literal["learned"]
    # bdense.weights.weighting.RULES, spelt out: a launcher reads studies without torch.
    rules: tuple[Literal["uncertainty", "gradient-norm"], ...] = ("uncertainty", "gradient-norm")
    strength: FloatRange = FloatRange(low=-1.0, high=1.5)
    memory: Count = 100

    @field_validator("rules")
    @classmethod
    def _each_once(cls, rules: tuple[str, ...]) -> tuple[str, ...]:
        if not rules or len(set(rules)) < len(rules):
            raise ValueError(
                f"{list(rules)} must name one rule or more, each once; leave it out for all"
            )
        return rules

    @property
    def is_one_point(self) -> bool:
        """Whether all trials would be the same."""
        return len(self.rules) == 1 and self.strength.low == self.strength.high


WeightsSpec = Annotated[
    LogLinearSpace | NormalisedSpace | LearnedSpace, Field(discriminator="parameterisation")
]


class BudgetSpec(Strict):
    """What a study may cost."""

    trials: Count
    kimg: Kimg
    batch: Count = 128
    lr: Positive = 5e-5

    @property
    def images(self) -> int:
        """Training images a trial."""
        return round(self.kimg * 1000)

    @property
    def iterations(self) -> int:
        """Updates a trial."""
        return -(-self.images // self.batch)


class SamplerSpec(Strict):
    """Who proposes: TPE (the paper's), a Gaussian process, or chance."""

    name: Literal["tpe", "gp", "random"] = "tpe"
    startup_trials: Count = 10


class SeedsSpec(Strict):
    """One training seed and one set of latents for all trials: common random numbers."""

    training: Seed = 0
    evaluation: Seed = 0
    sampler: Seed = 0


class TrajectoriesSpec(Strict):
    """Teacher trajectories: recorded once and shared, or walked live by every trial."""

    mode: Literal["recorded", "live"] = "recorded"
    dtype: Literal["float32", "float16"] = "float32"
    max_gib: Positive = 32.0


class ConfirmSpec(Strict):
    """How the best weights are told from lucky ones: fresh seeds, the same for all.

    Attributes:
        candidates: Of the search's points, those of lowest posterior mean.
        seeds: Fresh training seeds, and latents, each.
        kimg: The budget the winner will be used at, since the best weights move with it; unset:
            the search's own.
    """

    candidates: Count = 3
    seeds: Annotated[int, Field(ge=3)] = 3
    kimg: Kimg | None = None


# What each pruner can be told besides ``at``, ``images`` and ``startup_trials``, and its default.
_PRUNERS: dict[str, dict[str, float]] = {
    "none": {},
    "median": {},
    "percentile": {"percentile": 25.0},
    "successive-halving": {"factor": 2},
    "hyperband": {"factor": 2},
    "patient-median": {"patience": 1},
}
_PRUNER_KEYS = ("startup_trials", "percentile", "factor", "patience")


class PruningSpec(Strict):
    """FIDs on the way, and which of Optuna's pruners ends trials by them; off by default.

    A trial's last FID is the same with and without. A FID of fewer images is higher: those on the
    way compare with one another, at the same fraction, and with no last one.

    Attributes:
        pruner: ``none`` only looks. Of the others the rungs are the looks, in their order:
            halving is the textbook's where each of ``at`` is ``factor`` times the one before.
        at: Fractions of ``budget.kimg`` after which the student is measured, ascending.
        images: Drawn for each, on the trials' own latents; unset: ``evaluation.images``.
        startup_trials: Complete trials before any is pruned; 5 by default.
        percentile: A trial goes on if it is among the best so many percent of those complete.
        factor: Of so many trials at a rung one goes on.
        patience: Looks more without a better FID than the best before them, until the median
            decides.
    """

    pruner: Literal[
        "none", "median", "percentile", "successive-halving", "hyperband", "patient-median"
    ] = "none"
    at: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = ()
    images: Annotated[int, Field(ge=2)] | None = None
    startup_trials: Count | None = None
    percentile: Annotated[float, Field(gt=0, lt=100)] | None = None
    factor: Annotated[int, Field(ge=2)] | None = None
    patience: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _keys_of_its_own(cls, given: Any) -> Any:  # noqa: ANN401  as YAML has it
        """Refuse keys that the pruner does not have, and fill in those it has."""
        own = _PRUNERS.get(given.get("pruner", "none")) if isinstance(given, dict) else None
        if own is None:
            return given
        own = own if given.get("pruner", "none") == "none" else {"startup_trials": 5, **own}
        for key in _PRUNER_KEYS:
            if given.get(key) is not None and key not in own:
                others = [name for name, keys in _PRUNERS.items() if key in keys]
                instead = " or ".join(others) or "a pruner"
                raise ValueError(
                    f"pruner {given.get('pruner', 'none')} has no {key}; drop it or use {instead}"
                )
        return {**own, **{key: value for key, value in given.items() if value is not None}}

    @model_validator(mode="after")
    def _looks_for_the_pruner(self) -> "PruningSpec":
        if list(self.at) != sorted(set(self.at)):
            raise ValueError(f"at {list(self.at)} must ascend, each fraction once; sort it")
        if self.pruner != "none" and not self.at:
            raise ValueError(
                f"pruner {self.pruner} compares FIDs on the way and at names none; give fractions "
                "of the budget, as at: [0.25, 0.5]"
            )
        if self.pruner == "none" and self.images is not None and not self.at:
            raise ValueError(
                f"images {self.images} are drawn at no fraction of the budget; give at: [...] or "
                "drop images"
            )
        if self.patience is not None and len(self.at) < self.patience + 2:
            raise ValueError(
                f"patience {self.patience} decides at look {self.patience + 2} first and at has "
                f"{len(self.at)}; give more fractions or less patience"
            )
        return self


class StudySpec(ModelSpec):
    """A whole study."""

    student: StudentSpec
    weights: WeightsSpec
    budget: BudgetSpec
    sampler: SamplerSpec = Field(default_factory=SamplerSpec)
    seeds: SeedsSpec = Field(default_factory=SeedsSpec)
    trajectories: TrajectoriesSpec = Field(default_factory=TrajectoriesSpec)
    keep_students: Count = 3
    pruning: PruningSpec = Field(default_factory=PruningSpec)
    confirm: ConfirmSpec = Field(default_factory=ConfirmSpec)

    @field_validator("weights", mode="before")
    @classmethod
    def _learned_in_a_word(cls, given: Any) -> Any:  # noqa: ANN401  as YAML has it
        if given == "learned":
            return {"parameterisation": "learned"}
        if isinstance(given, str):
            raise ValueError(
                f"{given!r} alone says too little; give a mapping with parameterisation: ..., "
                "or the word learned for its defaults"
            )
        return given

    @model_validator(mode="after")
    def _gpus_share_a_batch_equally(self) -> "StudySpec":
        if self.budget.batch % self.resources.team:
            raise ValueError(
                f"budget.batch {self.budget.batch} cannot be shared equally by resources.gpus "
                f"{self.resources.team}; choose a multiple, or other gpus"
            )
        return self

    @model_validator(mode="after")
    def _looks_lie_on_the_way(self) -> "StudySpec":
        if (images := self.pruning.images or 0) > self.evaluation.images:
            raise ValueError(
                f"pruning.images {images} is above evaluation.images {self.evaluation.images}; "
                "lower it, or leave it out for as many"
            )
        iterations = self.budget.iterations
        after = [round(fraction * iterations) for fraction in self.pruning.at]
        if after and (after[0] < 1 or after[-1] >= iterations or len(set(after)) < len(after)):
            raise ValueError(
                f"pruning.at {list(self.pruning.at)} of {iterations} iterations are looks after "
                f"{after} of them, which must be different ones on the way; choose fractions "
                "further apart and from 0 and 1"
            )
        return self

    @property
    def looks(self) -> dict[int, float]:
        """Iterations after which a student is looked at on its way, and their fractions."""
        iterations = self.budget.iterations
        return {round(fraction * iterations): fraction for fraction in self.pruning.at}

    @property
    def look_images(self) -> int:
        """Images that are drawn for a look."""
        return self.pruning.images or self.evaluation.images

    def _conditions(self) -> dict[str, Any]:
        """Trial count, bounds, sampler, pruner, trajectory mode and resources may change.

        But for the number of GPUs that share a batch.
        """
        kept = super()._conditions()
        kept |= self.model_dump(include={"student", "budget", "seeds"}, mode="json")
        del kept["budget"]["trials"], kept["seeds"]["sampler"]
        kept["weights"] = {"parameterisation": self.weights.parameterisation}
        if isinstance(self.weights, LearnedSpace):
            # Optuna holds a categorical parameter to its first choices, in their order.
            kept["weights"] |= {"memory": self.weights.memory, "rules": list(self.weights.rules)}
        # Live trajectories are rounded to no stored type.
        recorded = self.trajectories.mode == "recorded"
        kept["trajectories"] = {"dtype": self.trajectories.dtype if recorded else "float32"}
        # Each of several GPUs draws the dropout of its own share of a batch.
        if self.resources.team > 1:
            kept["resources"] = {"gpus": self.resources.team}
        return kept
