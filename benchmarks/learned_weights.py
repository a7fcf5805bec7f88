"""Branch weights learned while training, against uniform ones and a searched a, seed by seed."""

import statistics
from collections.abc import Sequence

from search.spec.model_spec import FloatRange
from search.spec.study_file import read_spec
from search.spec.study_spec import LearnedSpace, NormalisedSpace, StudySpec
from search.worker.engine import check

from bdense.weights.spaces import RULES
from benchmarks.common import parser, publish
from benchmarks.students import Arm, add_study_options, conditions, fid_table, fids_of

SEEDS = (0, 1, 2)
STRENGTHS = (1.0, -0.5, -1.0)
SEARCHED_A = 1.145
PLAIN, UNIFORM = "plain SFD", "uniform weights"


def main() -> None:
    """Train, judge and print."""
    options = parser(__doc__)
    add_study_options(options, seeds=SEEDS)
    options.add_argument(
        "--a",
        type=float,
        default=SEARCHED_A,
        help="slope that the digits study found best (default: %(default)s)",
    )
    options.add_argument(
        "--strengths",
        type=float,
        nargs="+",
        default=STRENGTHS,
        metavar="S",
        help=f"of each rule (default: {' '.join(map(str, STRENGTHS))})",
    )
    given = options.parse_args()
    spec = read_spec(given.study)
    check(spec)
    arms = [*_given_arms(given.a), *_learned_arms(given.strengths)]
    fids = fids_of(spec, arms, given.seeds)
    publish("learned_weights", _body(spec, given.seeds, fids), write=given.write)


def _given_arms(a: float) -> list[Arm]:
    space = NormalisedSpace(parameterisation="normalised", a=FloatRange(low=a, high=a))
    return [
        Arm(name=PLAIN, params={"method": "sfd"}),
        Arm(name=UNIFORM, params={"method": "uniform"}),
        Arm(name=f"searched, a = {a:g}", params={"a": a}, weights=space),
    ]


def _learned_arms(strengths: Sequence[float]) -> list[Arm]:
    space = LearnedSpace(parameterisation="learned")
    return [
        Arm(
            name=f"{rule}, strength {strength:g}",
            params={"rule": rule, "strength": strength},
            weights=space,
        )
        for strength in strengths
        for rule in RULES
    ]


def _body(spec: StudySpec, seeds: Sequence[int], fids: dict[str, list[float]]) -> str:
    memory = LearnedSpace(parameterisation="learned").memory
    return f"""\
{conditions(spec)}
Learned weights have a memory of {memory} updates.

{fid_table(fids, seeds, UNIFORM)}

{_reading(fids)}"""


def _reading(fids: dict[str, list[float]]) -> str:
    means = {name: statistics.mean(values) for name, values in fids.items()}
    learned = [name for name in means if "strength" in name]
    best = min(learned, key=means.__getitem__)
    others = [name for name in means if name not in learned]
    changes = ", ".join(f"{means[best] / means[name] - 1:+.1%} from {name}" for name in others)
    wins = sum(mine < base for mine, base in zip(fids[best], fids[UNIFORM], strict=True))
    return (
        f"The best learned weights are {best}, mean FID {means[best]:.3f}: {changes}. "
        f"It is the lowest of {len(learned)}, and below uniform at {wins} of "
        f"{len(fids[best])} seeds."
    )


if __name__ == "__main__":
    main()
