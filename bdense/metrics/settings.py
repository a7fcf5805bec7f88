"""Names and settings of the metrics; importing this does not import torch."""

from dataclasses import dataclass
from typing import Literal, get_args

from bdense.knobs import Knobs, knob

MetricName = Literal["fid", "kid", "prc"]
METRICS: tuple[MetricName, ...] = get_args(MetricName)
KID_SUBSETS, KID_SEED = 100, 2020  # subsets of either set, and the seed of their draw


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricSettings(Knobs):
    """Settings of KID and of precision and recall; the FID has none."""

    # kid's deviation depends on it, the expectation of its mean does not.
    kid_subset_size: int = knob(1000, "images in each of kid's subsets", low=2)
    # 5 is the SFD reference's, 3 that of Kynkaanniemi et al.
    neighbours: int = knob(
        5, "nearest neighbours in prc; more raise precision and recall", low=1, metavar="K"
    )
