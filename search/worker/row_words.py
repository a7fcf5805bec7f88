"""What a study or a promotion calls its rows, for what is said of them before they run."""

from dataclasses import dataclass

from search.spec.model_spec import ModelSpec
from search.spec.promotion_spec import PromotionSpec
from search.spec.study_spec import StudySpec


@dataclass(frozen=True, slots=True, kw_only=True)
class RowWords:
    """What a spec calls what is foretold.

    Attributes:
        kind: Of spec.
        name: Of one of its rows.
        key: Of the images of an update, in its file.
        batch: Those images.
        can_share: Whether GPUs can share them.
    """

    kind: str
    name: str
    key: str
    batch: int
    can_share: bool


def words_of(spec: ModelSpec) -> RowWords:
    """A study's trial, or a promotion's chain."""
    if isinstance(spec, PromotionSpec):
        batch = spec.round.batch
        return RowWords(
            kind="promotion", name="chain", key="round.batch", batch=batch, can_share=False
        )
    assert isinstance(spec, StudySpec)
    batch = spec.budget.batch
    return RowWords(kind="study", name="trial", key="budget.batch", batch=batch, can_share=True)
