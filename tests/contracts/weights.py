"""What every source of branch weights promises; one subclass for each."""

import json
import pickle
from typing import Any

import pytest
import torch

from bdense.weights.weighting import BranchWeighting, Observed


def seen(weighting: BranchWeighting, count: int, first: int = 0) -> None:
    """Show it some updates, always the same."""
    for i in range(first, first + count):
        draw = torch.Generator().manual_seed(i)
        losses, norms, cosines = torch.rand(3, weighting.num_branches, generator=draw) + 0.1
        gradients = {"gradient_norms": norms, "cosines": 1.5 - 2 * cosines}
        given = gradients if weighting.needs_gradients else {}
        weighting.observe(Observed(losses=losses, progress=i / 10, **given))


class WeightingContract:
    """``make`` gives a new one of ``num_branches``; ``options`` are others of its kind."""

    num_branches = 4
    options: tuple[dict[str, Any], ...] = ()

    def make(self, **options: Any) -> BranchWeighting:
        raise NotImplementedError

    @pytest.mark.parametrize("count", [0, 1, 5])
    def test_weights_are_finite_and_not_negative(self, count):
        weighting = self.make()
        seen(weighting, count)
        weights = weighting.weights()
        assert weights.dim() in (1, 2)  # [K], or [S, K] for each of an iteration's updates
        assert weights.shape[-1] == weighting.num_branches == self.num_branches
        assert weights.dtype == torch.float64
        assert bool((weights.isfinite() & (weights >= 0)).all())
        assert bool((weights > 0).any(-1).all())
        assert not weights.requires_grad

    @pytest.mark.parametrize("count", [0, 3])
    def test_restored_it_goes_on_as_if_never_stopped(self, count):
        whole, stopped, resumed = self.make(), self.make(), self.make()
        seen(whole, count + 4)
        seen(stopped, count)
        resumed.restore({name: value.clone() for name, value in stopped.state().items()})
        seen(resumed, 4, first=count)
        assert torch.equal(resumed.weights(), whole.weights())

    def test_it_travels_to_another_process(self):
        weighting = self.make()
        seen(weighting, 3)
        copied = pickle.loads(pickle.dumps(weighting))  # noqa: S301
        assert torch.equal(copied.weights(), weighting.weights())

    def test_it_is_described_by_what_it_is_not_by_what_it_saw(self):
        weighting = self.make()
        before = json.dumps(weighting.describe())
        seen(weighting, 3)
        assert json.dumps(weighting.describe()) == before == json.dumps(self.make().describe())
        for options in self.options:
            assert json.dumps(self.make(**options).describe()) != before
