"""The seam between a study and what its rows train: a distillation, or a program of the user's.

Of either it is the part that needs no torch; the other is ``search.worker.trainer.Trainer``.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from bdense.weights.space import SearchSpace
from search.spec.metric import Metric
from search.spec.paths import Paths

if TYPE_CHECKING:
    from search.spec.study import StudySpec


class Workload(Protocol):
    """What the rows of one study train and are judged by; made of its spec.

    Attributes:
        unused: Sections of a study file that it has no use for, which a stored spec leaves out.
        has_students: Whether its rows are students with branch weights, which are shown, and which
            can be exported and promoted.
    """

    unused: ClassVar[tuple[str, ...]]
    has_students: ClassVar[bool]

    @property
    def metric(self) -> Metric:
        """What rows are judged by."""

    @property
    def baselines(self) -> tuple[str, ...]:
        """Names of the baselines, the simplest first; each has an arm."""

    @property
    def space(self) -> SearchSpace:
        """Where weights are searched, read from ``weights``."""

    def space_of(self, params: Mapping[str, Any]) -> SearchSpace:
        """The space of an arm's parameters, which another study may have found."""

    def budget(self, settings: Mapping[str, Any]) -> str:
        """What a row under these settings of the method is trained for, such as ``12.8 kimg``."""

    def check(self) -> None:
        """Raise a ``KnobError`` for sections that are missing, or not for this workload."""

    def with_absolute_files(self, paths: Paths) -> "StudySpec":
        """The spec with absolute paths of files that are there: workers run in other folders."""

    def resolve(self, source: str) -> "StudySpec":
        """The spec with the method's defaults and its facts, all checked; may load torch.

        Raises:
            SpecError: A setting is wrong. ``source`` is named in front.
        """

    def variant(self, changes: Mapping[str, Any], where: str = "method") -> "StudySpec":
        """A resolved spec with some of the method's settings replaced; ``where`` is their key.

        Raises:
            InputError: The method has no such setting, or refuses the value.
        """

    def conditions(self) -> dict[str, Any]:
        """What decides a row's value, nested, beside weights, seeds and ``contents``."""

    def contents(self) -> dict[str, str]:
        """What the study's files hold, by their key among the conditions.

        Files are identified by their digest, published ones by their name.
        """
