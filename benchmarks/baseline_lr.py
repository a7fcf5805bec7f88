"""Plain SFD at half, once and twice the study's lr, and B-DENSE over a, all else being equal."""

import statistics

from search.spec.study_file import read_spec
from search.spec.study_spec import StudySpec
from search.worker.engine import check

from benchmarks.common import parser, publish
from benchmarks.students import Arm, add_study_options, conditions, fid_table, fids_of

LR_FACTORS = (0.5, 1.0, 2.0)
CURVE = (-0.5, 0.0, 0.25, 0.5, 1.0, 1.386, 2.0)
REFERENCE = "plain SFD, lr x 1"


def main() -> None:
    """Train, judge and print."""
    options = parser(__doc__)
    options.add_argument("--curve", action="store_true", help=f"also B-DENSE at a in {CURVE}")
    add_study_options(options, seeds=None)
    given = options.parse_args()
    spec = read_spec(given.study)
    check(spec)
    arms = [*_plain_arms(), *(_curve_arms() if given.curve else [])]
    seeds = given.seeds or [spec.seeds.training]
    publish("baseline_lr", _body(spec, seeds, fids_of(spec, arms, seeds)), write=given.write)


def _plain_arms() -> list[Arm]:
    return [
        Arm(name=f"plain SFD, lr x {factor:g}", params={"method": "sfd"}, lr_factor=factor)
        for factor in LR_FACTORS
    ]


def _curve_arms() -> list[Arm]:
    # Without b the weights' sum is K; Adam does not see their scale.
    return [Arm(name=f"B-DENSE, a = {a:g}", params={"a": a}) for a in CURVE]


def _body(spec: StudySpec, seeds: list[int], fids: dict[str, list[float]]) -> str:
    reading = _reading({name: statistics.mean(values) for name, values in fids.items()})
    return f"{conditions(spec)}\n\n{fid_table(fids, seeds, REFERENCE)}\n\n{reading}"


def _reading(means: dict[str, float]) -> str:
    plain = [name for name in means if name.startswith("plain")]
    dense = [name for name in means if name not in plain]
    best = min(plain, key=means.__getitem__)
    text = f"Of these step sizes {best} is the baseline's best, mean FID {means[best]:.3f}"
    text += "." if best == REFERENCE else "; it may be better still beyond."
    if dense:
        winner = min(dense, key=means.__getitem__)
        change = f"{means[winner] / means[best] - 1:+.1%}"
        text += f" The best of the curve, {winner}, is {change} from it, at the study's lr alone."
    return text


if __name__ == "__main__":
    main()
