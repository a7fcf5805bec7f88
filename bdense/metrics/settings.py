"""Names and settings of the metrics; importing this does not import torch."""

from dataclasses import dataclass
from typing import Literal, get_args

from bdense.knobs import Knobs, knob

MetricName = Literal["fid", "kid", "prc"]
METRICS: tuple[MetricName, ...] = get_args(MetricName)


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricSettings(Knobs):
    """Settings of KID and of precision and recall; the FID has none."""

    kid_subsets: int = knob(100, "subsets of either set; more give kid a steadier mean", low=1)
    # The deviation depends on it, the mean's expectation does not.
    kid_subset_size: int = knob(1000, "images in each of kid's subsets", low=2)
    kid_seed: int = knob(2020, "seed of kid's subsets", low=0)
    # 5 is the SFD reference's, 3 that of Kynkaanniemi et al.
    neighbours: int = knob(
        5, "nearest neighbours in prc; more raise precision and recall", low=1, metavar="K"
    )
