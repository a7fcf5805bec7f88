"""What a study's trials are judged by."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from search.spec.command import COMMAND


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """What a study's trials are judged by.

    Attributes:
        name: In texts and on axes.
        key: In JSON.
        maximise: Whether more is better.
    """

    name: str = "FID"
    key: str = "fid"
    maximise: bool = False

    @classmethod
    def of(cls, method: Mapping[str, Any]) -> Self:
        """The metric of a method, from its name and settings as they are stored."""
        if method.get("name") != COMMAND:
            return cls()
        maximise = method.get("direction") == "maximise"
        return cls(name=str(method.get("metric")), key="value", maximise=maximise)

    @property
    def is_fid(self) -> bool:
        """Whether it is the FID of a distillation, rather than a program's metric."""
        return self.key == "fid"

    def loss(self, value: float) -> float:
        """The value, or its negative, so that lower is better."""
        return -value if self.maximise else value

    @property
    def form(self) -> str:
        """Format of a value for people: a program's may be of any size."""
        return ".3f" if self.is_fid else ".4g"

    @property
    def form_of_difference(self) -> str:
        """Format of a difference."""
        return "+.2f" if self.is_fid else "+.3g"

    def text(self, value: float) -> str:
        """A value for people."""
        return f"{value:{self.form}}"

    @property
    def best(self) -> str:
        """What the best of several values is, in a word."""
        return "highest" if self.maximise else "lowest"

    @property
    def plural(self) -> str:
        """Several of its values."""
        return f"{self.name}s" if self.is_fid else f"values of {self.name}"


FID_METRIC = Metric()
