"""What ``bdense-search doctor`` finds: each finding says what is so, and what to do about it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, TypeAlias

from search.storage.engine import redact

Level: TypeAlias = Literal["ok", "warning", "problem", "mended"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One answer to one check.

    Attributes:
        check: What was looked at, in a word or two.
        level: ``problem``: something is wrong, or a launch would be refused. ``warning``: worth
            knowing, or set right by the next launch.
        text: What is so.
        advice: What to do, where there is something.
        study: Which one it is about, if about one.
        mend: Sets it right without losing anything, where that can be done.
    """

    check: str
    level: Level
    text: str
    advice: str = ""
    study: str = ""
    mend: Callable[[], None] | None = None

    def of(self, study: str) -> Self:
        """The same, about that study."""
        return replace(self, study=study)

    def mended(self) -> Self:
        """Set it right, if that can be done; what is then so.

        Raises:
            Whatever the database or the disk answers.
        """
        if self.mend is None:
            return self
        self.mend()
        return replace(self, level="mended", advice="", mend=None)

    def line(self) -> str:
        """For people."""
        about = f"{self.study}: " if self.study else ""
        advice = f"; {self.advice}" if self.advice else ""
        by_fix = " (--fix does it)" if self.mend is not None else ""
        return redact(f"{self.level:<8} {about}{self.check}: {self.text}{advice}{by_fix}")

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "check": self.check,
            "level": self.level,
            "study": self.study or None,
            "text": redact(self.text),
            "advice": redact(self.advice) or None,
            "can_be_mended": self.mend is not None,
        }


def ok(check: str, text: str) -> Finding:
    """All is well."""
    return Finding(check=check, level="ok", text=text)


def warning(
    check: str, text: str, advice: str = "", mend: Callable[[], None] | None = None
) -> Finding:
    """Worth knowing, or set right by the next launch."""
    return Finding(check=check, level="warning", text=text, advice=advice, mend=mend)


def problem(
    check: str, text: str, advice: str = "", mend: Callable[[], None] | None = None
) -> Finding:
    """Something is wrong."""
    return Finding(check=check, level="problem", text=text, advice=advice, mend=mend)


def first_of(numbers: list[int], noun: str = "trial") -> str:
    """Some numbers in words, five of them at the most."""
    shown = ", ".join(map(str, numbers[:5]))
    more = f" and {len(numbers) - 5} more" if len(numbers) > 5 else ""
    return f"{noun}{'s' if len(numbers) > 1 else ''} {shown}{more}"
