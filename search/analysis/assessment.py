"""What a search's results say: their noise, the arm to use, and why the search ended early."""

from dataclasses import asdict, dataclass
from typing import Any

from search.analysis.comparison import compare
from search.analysis.confirmation import Verdict
from search.analysis.recommendation import Noise, Recommendation, noise_of, recommend
from search.analysis.stop_rule import LargestGain
from search.study.study import Study


@dataclass(frozen=True, slots=True, kw_only=True)
class Assessment:
    """An assessment of a search.

    Attributes:
        noise: Of the difference of two trials.
        recommended: The arm to use; None before a baseline is complete.
        ended: What ended the search before its last trial, if anything did.
    """

    noise: Noise
    recommended: Recommendation | None
    ended: LargestGain | None

    def lines(self) -> list[str]:
        """For people."""
        if self.recommended is None:
            lines = ["no arm is recommended before a baseline is complete"]
        else:
            lines = [self.noise.text(), self.recommended.text()]
        return lines if self.ended is None else [*lines, self.ended.text()]

    def as_dict(self) -> dict[str, Any]:
        """As ``best --json`` prints it."""
        return {
            "noise": self.noise.as_dict(),
            "recommended": None if self.recommended is None else self.recommended.as_dict(),
            **({} if self.ended is None else {"ended_early": asdict(self.ended)}),
        }


def assess(study: Study, found: Verdict | None) -> Assessment:
    """Assess a search by its confirmation, else by its baselines."""
    baselines = compare(study)
    return Assessment(
        noise=noise_of(baselines),
        recommended=recommend(baselines if found is None else found.comparison),
        ended=LargestGain.of(study),
    )
