"""CPU time of what a FID computes from features, against other ways to compute it, in turns."""

import statistics
import time
from collections.abc import Callable

import torch

from bdense.metrics import metrics
from bdense.metrics.metrics import frechet_distance, image_effects
from bdense.metrics.references import statistics_of, summed_statistics
from benchmarks.common import parser, publish, table
from benchmarks.timing import interleave

CPU = torch.device("cpu")


def main() -> None:
    """Measure and print."""
    options = parser(__doc__)
    options.add_argument("--images", type=int, default=5000, help="default: 5000")
    options.add_argument("--features", type=int, default=2048, help="default: 2048")
    options.add_argument("--pairs", type=int, default=3, help="pairs that count (default: 3)")
    given = options.parse_args()
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(0)
    mix = torch.randn(given.features, given.features, generator=draw) / given.features**0.5
    shape = (given.images, given.features)
    features, real = ((torch.randn(shape, generator=draw) @ mix).relu() for _ in range(2))
    own, reference = statistics_of(features), statistics_of(real)

    def anew() -> object:
        metrics._root.cache_clear()
        return image_effects(features, own, reference)

    pairs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "mean and covariance: torch's sums, numpy's": (
            lambda: summed_statistics(features, CPU),
            lambda: statistics_of(features),
        ),
        "effects of the images: the reference's root anew, kept": (
            anew,
            lambda: image_effects(features, own, reference),
        ),
    }
    rows = []
    for name, (first, second) in pairs.items():
        found = interleave(_seconds(first), _seconds(second), given.pairs)
        before, after = found.seconds
        rows.append((name, f"{before:.2f}", f"{after:.2f}", f"{found.ratio:.2f}", found.spread))
    distance = statistics.median(
        _seconds(lambda: frechet_distance(own, reference))() for _ in range(given.pairs)
    )
    body = (
        f"{given.images} images of {given.features} features; CPU seconds of a process with one "
        f"thread, medians of {given.pairs} pairs. This version has the second of each.\n\n"
        + table(("what", "first", "second", "first / second", "spread"), rows)
        + f"\n\nThe Frechet distance itself, whose eigenvalues are torch-fidelity's: "
        f"{distance:.2f} s."
    )
    publish("fid_time", body, write=given.write)


def _seconds(work: Callable[[], object]) -> Callable[[], float]:
    """CPU seconds of a call."""

    def measure() -> float:
        started = time.process_time()
        work()
        return time.process_time() - started

    return measure


if __name__ == "__main__":
    main()
