"""PromotionSpec: what weights that a search found are promoted to, by progressive distillation."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from search.spec.model_spec import Count, ModelSpec, Positive, Seed, Strict
from search.spec.study_spec import ScheduleSpec


class ChainSpec(Strict):
    """Numbers of steps: from the teacher's down, each the one before divided by ``substeps``."""

    first: Count
    last: Count
    substeps: Annotated[int, Field(ge=2, description="K")] = 2

    @property
    def steps(self) -> tuple[int, ...]:
        """N of the teacher, then of each round's student, going down."""
        steps = [self.first]
        while steps[-1] > self.last:
            steps.append(steps[-1] // self.substeps)
        return tuple(steps)


class RoundSpec(Strict):
    """How each round is trained; names and meanings are ``PDConfig``'s."""

    updates: Count
    batch: Count = 128
    lr: Positive = 5e-5
    anneal: bool = True
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    clip_norm: Positive | None = 1.0
    loss: Literal["constant", "snr", "snr_trunc", "v"] = "snr_trunc"
    clip_targets: bool = False
    dropout: bool = False
    flip: bool = False


class PromotionSeeds(Strict):
    """Training seeds, the same for all arms, and one set of latents."""

    training: tuple[Seed, ...] = (0, 1, 2)
    evaluation: Seed = 0

    @field_validator("training")
    @classmethod
    def _each_once(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if not seeds or len(set(seeds)) < len(seeds):
            raise ValueError(f"{list(seeds)} must name one seed or more, each once")
        return seeds


class PromotionSpec(ModelSpec):
    """One file: teacher, chain, rounds, how students are judged.

    Attributes:
        study: The search whose weights are promoted, where the command names none.
        prediction_type: What the students predict, where it is not what the teacher does.
        schedule: Noise levels: ``native`` is the teacher's own VP process.
        clip_samples: Draw with predictions clamped to [-1, 1].
        weights_space: ``clean`` takes log w_k = a k + b as it is; ``state`` multiplies w_k by
            1 - t_{n,k} / t_n, as SFD's loss does by itself.
    """

    needs_data: ClassVar[bool] = True

    study: str | None = None
    chain: ChainSpec
    prediction_type: Literal["epsilon", "sample", "v_prediction"] | None = None
    schedule: Literal["native"] | ScheduleSpec = "native"
    round: RoundSpec
    clip_samples: bool = False
    weights_space: Literal["clean", "state"] = "clean"
    seeds: PromotionSeeds = Field(default_factory=PromotionSeeds)

    @model_validator(mode="after")
    def _measured_by_the_fid(self) -> "PromotionSpec":
        if set(self.evaluation.metrics) != {"fid"}:
            raise ValueError(
                f"evaluation.metrics {list(self.evaluation.metrics)}: rounds are measured by "
                "their FID alone; leave it out"
            )
        if self.precision == "float16":
            raise ValueError(
                "precision float16: the gradients of progressive distillation are too small for "
                "it; use bfloat16"
            )
        return self

    @model_validator(mode="after")
    def _one_device_a_chain(self) -> "PromotionSpec":
        if self.resources.team > 1:
            raise ValueError(
                f"resources.gpus {self.resources.gpus:g}: a chain of progressive distillation "
                "runs on one GPU; give 1, and more workers for more chains at once"
            )
        return self

    def _conditions(self) -> dict[str, Any]:
        """Seeds of training, the search it names, and resources may change."""
        kept = super()._conditions()
        kept |= self.model_dump(
            include={
                "chain",
                "prediction_type",
                "schedule",
                "round",
                "clip_samples",
                "weights_space",
            },
            mode="json",
        )
        kept["seeds"] = {"evaluation": self.seeds.evaluation}
        return kept
