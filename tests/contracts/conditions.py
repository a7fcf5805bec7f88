"""What every kind of condition promises; subclass it and give ``conditions`` and ``dataset``.

``dataset`` holds 8 images that say something of the kind, and ``network`` fixtures take it.
"""

import json

import pytest
import torch

from tests.networks import image


class ConditionContract:
    """How a batch is told something, for training, evaluation and from data."""

    def rows(self, condition) -> dict[str, list]:
        return {name: value.tolist() for name, value in condition.arguments().items()}

    def test_each_image_has_a_row(self, conditions):
        for value in conditions.drawn(0, 0, 5).arguments().values():
            assert len(value) == 5

    def test_a_part_is_told_the_same(self, conditions):
        whole = conditions.drawn(0, 0, 5)
        assert self.rows(whole.part(slice(1, 3))) == {
            name: rows[1:3] for name, rows in self.rows(whole).items()
        }

    def test_a_draw_follows_from_the_seed_and_the_iteration(self, conditions):
        first = self.rows(conditions.drawn(0, 0, 64))
        assert self.rows(conditions.drawn(0, 0, 64)) == first
        for other in (conditions.drawn(0, 1, 64), conditions.drawn(1, 0, 64)):
            assert self.rows(other) != first or not first

    def test_an_evaluated_image_does_not_depend_on_its_batch(self, conditions):
        whole = self.rows(conditions.evaluation(3, range(6)))
        part = self.rows(conditions.evaluation(3, range(2, 5)))
        assert part == {name: rows[2:5] for name, rows in whole.items()}

    def test_a_data_set_tells_its_images(self, conditions, dataset):
        conditions.require(dataset)
        index = torch.tensor([5, 0, 3])
        picked = self.rows(conditions.of(dataset, index))
        every = self.rows(conditions.of(dataset, torch.arange(8)))
        assert picked == {name: [rows[i] for i in index] for name, rows in every.items()}

    def test_its_null_is_one_row_of_the_same_kind(self, conditions):
        if (null := conditions.null()) is None:
            return
        rows, drawn = null.arguments(), conditions.drawn(0, 0, 2).arguments()
        assert {k: v.shape for k, v in rows.items()} == {
            k: (1, *v.shape[1:]) for k, v in drawn.items()
        }
        assert all(not torch.equal(v[:1], rows[k]) for k, v in drawn.items())

    def test_it_describes_what_it_draws(self, conditions):
        assert json.loads(json.dumps(conditions.describe())) == conditions.describe()

    def test_it_moves_to_another_type(self, conditions):
        like = torch.zeros(1, dtype=torch.float64)
        for value in conditions.drawn(0, 0, 2).to(like).arguments().values():
            assert value.dtype == torch.float64

    @pytest.mark.parametrize("num_points", [None, 4])
    def test_a_denoiser_is_bound_to_it(self, conditions, network, num_points):
        condition = conditions.drawn(0, 0, 3)
        x, sigma = image(), torch.tensor(1.0)
        bound = network.given(condition, num_points)(x, sigma)
        torch.testing.assert_close(bound, network(x, sigma, **condition.arguments()))
        self.is_of(network, conditions)

    def is_of(self, network, conditions) -> None:
        """The network says itself what it takes; prompts are given."""
        assert type(network.conditions) is type(conditions)
