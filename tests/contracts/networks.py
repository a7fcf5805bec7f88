"""What every network promises; subclass it and give a ``network`` fixture.

The network is small, in eval mode, with one branch and with weights that all matter.
"""

import copy

import pytest
import torch

from bdense.diffusion.branches import export_branch, recombine_branches, widen_head
from bdense.diffusion.denoiser import NetworkDenoiser, build_denoiser
from bdense.diffusion.preconditioning import EDM, IDDPM
from bdense.diffusion.step_condition import with_step_condition
from bdense.errors import CheckpointError, InputError, ShapeError
from bdense.networks import NETWORKS, Network
from tests.small import same_weights

LEVELS = torch.tensor([0.1, 1.0, 20.0])


def three_branches(denoiser: NetworkDenoiser) -> NetworkDenoiser:
    """A student whose branches differ."""
    student = widen_head(denoiser, 3)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in student.model.get_submodule(student.model.head_name).parameters():
            parameter.normal_()
    return student


class NetworkContract:
    """A network's shapes and conditions, and its branches."""

    @pytest.fixture
    def denoiser(self, network):
        two = network.prediction_channels == 2 * network.img_channels
        return NetworkDenoiser(network, IDDPM() if two else EDM()).eval()

    @pytest.fixture
    def x(self, network):
        shape = (3, network.img_channels, network.img_resolution, network.img_resolution)
        return torch.randn(shape, generator=torch.Generator().manual_seed(1))

    @pytest.fixture
    def told(self, network):
        """What every call of the denoiser needs."""
        return network.example()

    # ---- the step condition ----

    def test_a_step_condition_changes_nothing_before_it_is_trained(self, denoiser, x, told):
        if denoiser.step_condition:
            pytest.skip("it has one")
        try:
            student = with_step_condition(denoiser, seed=1)
        except InputError:
            pytest.skip("it takes none")
        expected = denoiser(x, LEVELS, **told)
        for points in (2, 5):
            assert torch.equal(student(x, LEVELS, **told, num_points=points), expected)
        student(x, LEVELS, **told, num_points=5).square().sum().backward()
        shifts = [p for name, p in student.named_parameters() if "affine_step" in name]
        assert all(shift.grad.any() for shift in shifts)
        # Also in the midst of a training.
        assert torch.equal(copy.deepcopy(student)(x, LEVELS, **told, num_points=2), expected)
        started = with_step_condition(denoiser, start="random", seed=1)
        copied = copy.deepcopy(started)
        with torch.no_grad():
            two, five = (started(x, LEVELS, **told, num_points=n) for n in (2, 5))
            assert (two - five).abs().max() > 1e-4
            # A copy is told by itself, and each image by its own number.
            assert torch.equal(copied(x, LEVELS, **told, num_points=2), two)
            assert torch.equal(started(x, LEVELS, **told, num_points=5), five)
            each = started(x, LEVELS, **told, num_points=torch.tensor([2, 5, 5]))
            torch.testing.assert_close(each, torch.cat([two[:1], five[1:]]), rtol=1e-4, atol=1e-5)
            again = build_denoiser(started.describe()).eval()
            again.load_state_dict(started.state_dict())
            assert torch.equal(again(x, LEVELS, **told, num_points=5), five)

    # ---- the network ----

    def test_its_name_is_that_of_the_registry(self, network):
        assert NETWORKS[network.describe()["network"]] is type(network)

    def test_a_description_builds_the_same_architecture(self, denoiser):
        again = build_denoiser(denoiser.describe())
        assert again.describe() == denoiser.describe()
        again.load_state_dict(denoiser.state_dict())

    def test_its_shapes_are_known_without_memory(self, denoiser):
        """Files are compared with them before anything is allocated."""
        with torch.device("meta"):
            skeleton = build_denoiser(denoiser.describe()).state_dict()
        assert {name: value.shape for name, value in skeleton.items()} == {
            name: value.shape for name, value in denoiser.state_dict().items()
        }

    def test_options_that_do_not_fit_are_named(self, denoiser):
        described = denoiser.describe()
        for config in (described["config"] | {"depth": 3}, {"depth": 3}):
            with pytest.raises(CheckpointError):
                build_denoiser(described | {"config": config})

    def test_images_come_out_as_they_go_in(self, network, x, told):
        out = network(x, torch.tensor([0.5]), **told)
        assert out.shape == (3, network.out_channels, *x.shape[2:])
        torch.testing.assert_close(network(x, torch.full((3,), 0.5), **told), out)

    def test_images_and_levels_matter_each_to_their_own(self, network, x, told):
        levels = torch.tensor([0.1, 0.5, 2.0])
        out = network(x, levels, **told)
        for i in range(3):
            alone = network(x[i : i + 1], levels[i : i + 1], **told)
            torch.testing.assert_close(out[i : i + 1], alone, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(network(x, levels.flip(0), **told), out, atol=1e-5)

    def test_every_parameter_has_a_gradient(self, network, x, told):
        classes = torch.eye(network.label_dim)[: len(x)] if network.label_dim else None
        out = network(x, torch.tensor([0.3, 0.5, 2.0]), classes, **told)
        out.square().sum().backward()
        unused = [name for name, p in network.named_parameters() if p.grad is None]
        # Augmentation labels are off in distillation.
        assert all("augment" in name for name in unused)

    def test_activations_that_are_computed_again_change_nothing(self, network, x, told):
        """Bit for bit, dropout included; a network without blocks says so."""

        def walk() -> tuple[int, list[torch.Tensor]]:
            """Bytes kept for going backwards, the output and all gradients."""
            kept: dict[int, int] = {}

            def note(saved: torch.Tensor) -> torch.Tensor:
                kept[saved.data_ptr()] = saved.untyped_storage().nbytes()
                return saved

            network.zero_grad()
            with torch.random.fork_rng():
                torch.manual_seed(0)
                with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
                    out = network(x, LEVELS, **told)
            out.square().sum().backward()
            found = [p.grad for p in network.parameters() if p.grad is not None]
            return sum(kept.values()), [out.detach(), *map(torch.clone, found)]

        network.train()
        most, expected = walk()
        if type(network).checkpoint_blocks is Network.checkpoint_blocks:
            with pytest.raises(InputError, match=type(network).__name__):
                network.checkpoint_blocks(True)
            return
        network.checkpoint_blocks(True)
        least, found = walk()
        assert least < most
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        network.checkpoint_blocks(False)
        assert walk()[0] == most

    def test_classes_matter_and_none_is_zeros(self, network, x, told):
        level, classes = torch.tensor([0.5]), network.label_dim
        if not classes:
            with pytest.raises(ShapeError):
                network(x, level, torch.ones(3, 1), **told)
            return
        unlabelled = network(x, level, **told)
        torch.testing.assert_close(network(x, level, torch.zeros(3, classes), **told), unlabelled)
        labelled = network(x, level, torch.eye(classes)[:3], **told)
        assert not torch.allclose(labelled, unlabelled)
        one_row = network(x, level, torch.eye(classes)[:1], **told)
        torch.testing.assert_close(one_row[0], labelled[0])
        with pytest.raises(ShapeError):
            network(x, level, torch.ones(3, classes + 1), **told)

    def test_other_images_and_conditions_are_refused(self, network, x, told):
        with pytest.raises(ShapeError):
            network(x[:, :, 1:, 1:], torch.tensor([0.5]), **told)
        other = {} if network.step_condition else {"num_points": 4}
        with pytest.raises(InputError, match="num_points"):
            network(x, torch.tensor([0.5]), **other)

    # ---- its branches ----

    @pytest.mark.parametrize("num_branches", [1, 3])
    def test_every_branch_of_a_widened_network_is_the_network(
        self, denoiser, x, told, num_branches
    ):
        student = widen_head(denoiser, num_branches)
        expected = denoiser(x, LEVELS, **told)
        branches = student.branches(x, LEVELS, **told)
        assert branches.shape[1] == student.num_branches == num_branches
        for k in range(num_branches):
            torch.testing.assert_close(branches[:, k], expected, rtol=0, atol=1e-5)
            assert same_weights(export_branch(student, k + 1), denoiser)

    def test_a_branch_is_taken_out_as_it_has_become(self, denoiser, x, told):
        """Branches that differ: each is its own, and not mixed with its neighbours."""
        student = three_branches(denoiser)
        branches = student.branches(x, LEVELS, **told)
        for k in range(3):
            alone = export_branch(student, k + 1)(x, LEVELS, **told)
            torch.testing.assert_close(alone, branches[:, k], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(branches[:, 0], branches[:, 1], atol=0.1)
        assert torch.equal(student(x, LEVELS, **told), branches[:, 2])

    def test_recombined_branches_are_the_sum_of_their_outputs(self, denoiser, x, told):
        student = three_branches(denoiser.double())
        c = torch.tensor([-0.2, 0.5, 0.7], dtype=torch.float64)
        branches = student.branches(x.double(), LEVELS, **told)
        alone = recombine_branches(student, c.tolist())
        assert alone.describe() == denoiser.describe()
        torch.testing.assert_close(
            alone(x.double(), LEVELS, **told), torch.einsum("k,bk...->b...", c, branches)
        )

    def test_one_branch_recombined_is_that_branch_bit_for_bit(self, denoiser):
        student = three_branches(denoiser)
        for k in range(3):
            chosen = [float(j == k) for j in range(3)]
            assert same_weights(recombine_branches(student, chosen), export_branch(student, k + 1))

    def test_a_wider_head_is_the_only_cost(self, network):
        head = network.get_submodule(network.head_name)
        row = sum(p.numel() for p in head.parameters())
        sizes = [sum(p.numel() for p in n.parameters()) for n in (network, network.widen(3))]
        assert sizes[1] - sizes[0] == 2 * row

    def test_dtype_and_mode_are_kept_and_random_numbers_left_alone(self, network):
        torch.manual_seed(5)
        expected = torch.rand(1)
        torch.manual_seed(5)
        student = network.double().train().widen(2)
        assert torch.equal(torch.rand(1), expected)
        assert (student.training, network.training) == (True, True)
        assert {p.dtype for p in student.parameters()} == {torch.float64}
        assert all(p.requires_grad for p in student.parameters())

    def test_branches_that_are_not_there_are_refused(self, network):
        with pytest.raises(InputError, match=r"num_branches \(K\) must be at least 1, got 0"):
            network.widen(0)
        student = network.widen(2)
        with pytest.raises(InputError, match="2 branches already"):
            student.widen(2)
        for branch in (0, 3):
            with pytest.raises(InputError, match=rf"branch must lie in 1\.\.2, got {branch}"):
                student.select(branch)

    def test_another_layout_of_the_head_is_refused(self, network):
        """By its number of rows, or else by what its branches answer."""
        outer, inner = network.head_layout
        for wrong in {(outer + 1, inner), (inner, outer)} - {(outer, inner)}:
            network.head_layout = wrong
            with pytest.raises(ShapeError, match="set head_layout"):
                network.widen(3)
