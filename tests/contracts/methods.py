"""What any training stage and any distillation method promises; one subclass for each."""

import contextlib
import copy
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bdense.diffusion.branches import export_branch, widen_head
from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.diffusion.sampling import samplers_from
from bdense.errors import CheckpointError, InputError, NonFiniteLossError, StoppedError
from bdense.execution import Execution
from bdense.knobs import Knob, knobs_of
from bdense.methods.distill import TrainedStage, distill
from bdense.methods.method import Inputs, Method, StagePlan
from bdense.models.store import denoiser_sha256, load_denoiser, load_tensors
from bdense.training.loop import Evaluations, train
from bdense.training.stage import BranchMeans, Training
from bdense.weights.weighting import BranchWeighting, FixedWeights, LearnedWeights
from tests.small import same_weights

ONE = torch.ones(1, dtype=torch.float64)
TWO_CPUS = [torch.device("cpu")] * 2
ALL = slice(None)


class KilledError(Exception):
    """Stands for a kill at that point."""


def dying_in(iteration: int) -> Callable[..., None]:
    """An ``on_iteration`` that is killed in that one."""

    def kill(*told: Any) -> None:
        if told[-1].iteration == iteration:
            raise KilledError

    return kill


class HalfSquare:
    """A perceptual loss without a network, in the place of LPIPS."""

    def __init__(self, *, as_reference: bool = False) -> None:
        self.share = 0.25 if as_reference else 0.5

    def __call__(self, images: Tensor, targets: Tensor) -> Tensor:
        return self.share * (images - targets).square().mean()

    def describe(self) -> dict[str, Any]:
        return {"name": "half", "share": self.share, "range": [-1, 1]}


class Around:
    """A stage with something added; what is not defined here is the stage's own."""

    def __init__(self, stage: Training) -> None:
        self.own = stage

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)


class Watched(Around):
    """Shows its student."""

    def begin(self, student: NetworkDenoiser) -> None:
        self.student = student
        self.own.begin(student)


class Steep(Watched):
    """From an update on, the gradient of one branch overflows; the losses stay as they are."""

    def __init__(self, stage: Training, branch: int, first: int) -> None:
        super().__init__(stage)
        self.branch, self.first, self.made = branch, first, 0

    def updates(self, iteration: int, batch: Any) -> Iterator[Any]:
        for update in self.own.updates(iteration, batch):
            if self.made < self.first:
                yield update
            else:
                yield _SteepUpdate(update, self.branch)
            self.made += 1


class _SteepUpdate(Around):
    def __init__(self, update: Any, branch: int) -> None:
        super().__init__(update)
        self.branch = branch

    def __call__(self, branches: Any) -> BranchMeans:
        losses = self.own(branches)
        found = list(losses.per_branch)
        own = found[self.branch - 1]
        # Adds nothing, and what it multiplies the gradient by overflows: 0 stays 0.
        huge = torch.finfo(own.dtype).max ** 0.75
        found[self.branch - 1] = own + huge * (huge * (own - own.detach()))
        return BranchMeans(torch.stack(found), keeps_graph=losses.keeps_graph)


class Copies(TorchDispatchMode):
    """Notes each copy between devices, and whether the caller waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].device != result.device:
            self.waits.append(not (kwargs or {}).get("non_blocking", False))
        elif func is torch.ops.aten.copy_.default and args[0].device != args[1].device:
            self.waits.append(not (args[2:] or (False,))[0])
        return result


def tensors_of(batch: Any) -> dict[str, Tensor]:
    """All tensors of a batch, by name."""
    if isinstance(batch, Tensor):
        return {"": batch}
    if not is_dataclass(batch):
        return {}
    found = {}
    for each in fields(batch):
        inside = tensors_of(getattr(batch, each.name))
        found |= {f"{each.name}.{name}": value for name, value in inside.items()}
    return found


def equal(a: Any, b: Any) -> bool:
    """Two batches, bit for bit."""
    left, right = tensors_of(a), tensors_of(b)
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def assert_no_waits(stage: Training, weighting: BranchWeighting) -> None:
    """In an iteration, up to the loop's own reading of the losses.

    torch's meta device has shapes alone: to read a value from it is an error. On a GPU it is a
    wait.
    """
    meta = torch.device("meta")
    student = widen_head(stage.start, stage.num_branches).on(meta).train(stage.dropout)
    stage = stage.on(meta)
    stage.begin(student)
    for iteration in (2, 3):  # the first may copy what is kept for all others
        # The device has no autocast, not even to turn it off.
        with pytest.MonkeyPatch.context() as patch, Copies() as copies:
            patch.setattr(Execution, "autocast", lambda *_: contextlib.nullcontext())
            for update in stage.updates(iteration, stage.batch(iteration, ALL)):
                losses = update(student.branches)
                losses.weighted(weighting.weights()).backward(retain_graph=losses.keeps_graph)
            stage.end(iteration)
    assert any(p.grad is not None for p in student.parameters())
    assert copies.waits
    assert not any(copies.waits)


class TrainingContract:
    """A stage of five updates or more, whose student trains with dropout.

    ``learning`` makes it; ``rate`` is a step size at which rounding stays rounding;
    ``keeps_graphs`` says that updates keep their graphs, so that losses are read at once.
    """

    rate: ClassVar[float] = 1e-4
    keeps_graphs: ClassVar[bool] = False

    def learning(self, seed: int = 5, **changes: Any) -> Training:
        """The stage with some knobs changed; ``dropout=False`` and ``lr`` are understood."""
        raise NotImplementedError

    def written_out(self) -> tuple[Training, NetworkDenoiser]:
        """A stage with one branch, and its student made by a loop written out in the test."""
        raise NotImplementedError

    def outputs(self, student: NetworkDenoiser) -> Tensor:
        """What is compared where weights cannot be: that of the student which is trained."""
        return outputs(student)

    def weighting(self, stage: Training) -> BranchWeighting:
        return FixedWeights(torch.linspace(0.5, 1.5, stage.num_branches, dtype=torch.float64))

    def weightings(self) -> dict[str, Callable[[int], BranchWeighting]]:
        """By name, for K branches."""
        found: dict[str, Callable[[int], BranchWeighting]] = {
            "fixed": lambda k: FixedWeights(torch.linspace(0.5, 1.5, k, dtype=torch.float64))
        }
        if self.learning().num_branches > 1:
            # One by gradients and a mean, one by progress.
            for rule in ("alignment", "anneal"):
                found[rule] = lambda k, rule=rule: LearnedWeights(k, rule=rule)
        return found

    def test_one_branch_equals_a_loop_written_out_bit_for_bit(self):
        stage, expected = self.written_out()
        student = train(stage, FixedWeights(ONE))
        assert same_weights(student, expected)
        assert not same_weights(student, stage.start)
        assert not student.training

    @pytest.mark.parametrize("killed_in", [0, 1, 4])
    def test_stopped_and_resumed_equals_never_stopped_bit_for_bit(self, tmp_path, killed_in):
        """Dropout included, whatever the new process' random state."""
        for name, weighting in self.weightings().items():
            path = tmp_path / f"{name}.safetensors"

            def run(name=name, weighting=weighting, **options) -> NetworkDenoiser:
                stage = self.learning()
                return train(stage, weighting(stage.num_branches), **options)

            whole = run()
            with pytest.raises(KilledError):
                run(checkpoint=path, checkpoint_seconds=0, on_iteration=dying_in(killed_in))
            kept = load_tensors(path)[1]["iteration"] if path.exists() else 0
            assert kept == killed_in
            torch.manual_seed(99)
            for expected in (range(killed_in, self.learning().num_updates), ()):
                # Once more, after its last save: it does nothing.
                seen: list[Any] = []
                resumed = run(checkpoint=path, on_iteration=seen.append)
                assert same_weights(resumed, whole)
                assert [done.iteration for done in seen] == list(expected)

    def test_a_run_that_is_asked_to_stop_saves_just_there(self, tmp_path):
        stage, path = self.learning(), tmp_path / "checkpoint.safetensors"
        saves = []

        def stop(done):
            if done.iteration == 2:
                raise StoppedError("enough")

        with pytest.raises(StoppedError):
            train(
                stage,
                self.weighting(stage),
                checkpoint=path,
                checkpoint_seconds=1e6,
                on_iteration=stop,
                on_save=saves.append,
            )
        assert load_tensors(path)[1]["iteration"] == 3
        assert saves == [3]

    def test_losses_that_are_read_together_change_nothing(self, tmp_path, monkeypatch):
        """Weights and reports; a stop saves where the run is, after all reports until there."""
        monkeypatch.setattr("bdense.training.loop.UNREAD_SECONDS", 1e9)

        class Counted(Around):
            ended = 0

            def end(self, iteration: int) -> None:
                self.ended = iteration + 1
                self.own.end(iteration)

        for name, weighting in self.weightings().items():
            seen: dict[int, list[Any]] = {1: [], 4: []}
            students = []
            for unread, reports in seen.items():
                stage = Counted(self.learning())
                read_at = []

                def report(done, stage=stage, reports=reports, read_at=read_at):
                    reports.append((done.iteration, done.loss, done.gradient_norm))
                    read_at.append(stage.ended)

                students.append(
                    train(
                        stage,
                        weighting(stage.num_branches),
                        on_iteration=report,
                        unread=unread,
                    )
                )
                at_once = unread == 1 or self.keeps_graphs
                assert read_at[:5] == ([1, 2, 3, 4, 5] if at_once else [1, 5, 5, 5, 5])
            assert same_weights(*students)
            assert seen[1] == seen[4]

            path, told = tmp_path / f"{name}.safetensors", []

            def stop(done, told=told):
                told.append(done.iteration)
                if done.iteration == 1:
                    raise StoppedError("enough")

            stage = self.learning()
            keep = {"checkpoint": path, "checkpoint_seconds": 1e6}
            with pytest.raises(StoppedError):
                train(stage, weighting(stage.num_branches), on_iteration=stop, unread=4, **keep)
            done = 2 if self.keeps_graphs else 5
            assert load_tensors(path)[1]["iteration"] == done
            assert told == list(range(done))
            again = self.learning()
            assert same_weights(train(again, weighting(again.num_branches), **keep), students[0])

    def test_batches_depend_on_seed_and_iteration_alone(self):
        one, same, other = self.learning(), self.learning(), self.learning(seed=6)
        forward = [one.batch(i, ALL) for i in range(4)]
        for i in (3, 0, 2, 1):
            assert equal(same.batch(i, ALL), forward[i])
            assert not equal(other.batch(i, ALL), forward[i])
        assert not equal(forward[0], forward[1])

    def test_no_update_waits_for_its_device(self):
        stage = self.learning()
        assert_no_waits(stage, self.weighting(stage))

    def test_devices_take_their_parts_of_the_same_batch(self):
        stage = self.learning()
        half = stage.batch_size // 2
        whole = tensors_of(stage.batch(1, ALL))
        parts = [tensors_of(stage.batch(1, s)) for s in (slice(half), slice(half, 2 * half))]
        for name, value in whole.items():
            # Images are the first axis, or the second of a stack of them.
            axis = value.shape.index(stage.batch_size)
            assert torch.equal(torch.cat([part[name] for part in parts], axis), value)

    def assert_equal_to_rounding(
        self, weighting: Callable[[int], BranchWeighting], *ways: tuple[Training, Any]
    ) -> None:
        """Two trainings, each a stage and its devices.

        Outputs, not weights: Adam makes steps of rounding noise where a gradient cancels.
        """
        reports: list[list[Any]] = [[], []]
        found = []
        for (stage, devices), report in zip(ways, reports, strict=True):
            weights = weighting(stage.num_branches)
            student = train(stage, weights, devices=devices, on_iteration=report.append)
            found.append(self.outputs(student))
        for one, other in zip(*reports, strict=True):
            torch.testing.assert_close(
                one.branch_losses, other.branch_losses, rtol=1e-4, atol=1e-6
            )
            torch.testing.assert_close(one.weights, other.weights, rtol=1e-3, atol=1e-5)
            assert other.loss == pytest.approx(one.loss, rel=1e-4)
            assert other.gradient_norm == pytest.approx(one.gradient_norm, rel=1e-3)
        start = self.outputs(widen_head(stage.start, stage.num_branches))
        assert (found[0] - found[1]).abs().max() < 1e-2 * (found[0] - start).abs().max()

    def test_two_devices_equal_one_to_rounding(self):
        stages = [self.learning(dropout=False, lr=self.rate) for _ in range(2)]
        self.assert_equal_to_rounding(
            self.weightings()["fixed"], *zip(stages, (None, TWO_CPUS), strict=True)
        )

    def test_a_checkpoint_of_another_run_is_refused(self, tmp_path):
        path = tmp_path / "checkpoint.safetensors"
        keep = {"checkpoint": path, "checkpoint_seconds": 0}
        stage = self.learning()
        train(stage, self.weighting(stage), **keep)
        before = path.read_bytes()
        for other in (self.learning(seed=6), self.learning(lr=0.5)):
            with pytest.raises(CheckpointError, match="belongs to another run"):
                train(other, self.weighting(other), **keep)
        if stage.num_branches > 1:
            with pytest.raises(CheckpointError, match="differs in: weights"):
                train(stage, FixedWeights(torch.ones(stage.num_branches)), **keep)
        assert path.read_bytes() == before

    def test_a_loss_that_is_not_finite_stops_the_run_before_an_update(self, tmp_path):
        stage = self.learning()
        with torch.no_grad():
            next(stage.start.parameters()).fill_(float("nan"))
        path = tmp_path / "checkpoint.safetensors"
        with pytest.raises(NonFiniteLossError, match="the loss is not finite") as caught:
            train(stage, self.weighting(stage), checkpoint=path, checkpoint_seconds=0)
        assert (caught.value.iteration, caught.value.branch) == (0, 1)
        assert not path.exists()

    @pytest.mark.parametrize("first", [0, 1, 3])
    def test_a_gradient_that_is_not_finite_is_named_and_makes_no_update(
        self, tmp_path, monkeypatch, first
    ):
        """By iteration and branch; the student is left as the last good update made it.

        Also where it is seen after later updates.
        """
        calm = self.learning()
        branch = calm.num_branches
        path, kept = tmp_path / "checkpoint.safetensors", []

        class Noted(Steep):
            def updates(self, iteration: int, batch: Any) -> Iterator[Any]:
                for update in super().updates(iteration, batch):
                    kept.append(
                        (iteration, update.where, copy.deepcopy(self.student.state_dict()))
                    )
                    yield update

        stage = Noted(self.learning(), branch, first)
        with pytest.raises(NonFiniteLossError, match="the gradient is not finite") as caught:
            train(stage, self.weighting(calm), checkpoint=path, checkpoint_seconds=0)
        at_once, (iteration, where, state) = stage, kept[first]
        late = Noted(self.learning(), branch, first)
        monkeypatch.setattr("bdense.training.loop.UNREAD_SECONDS", 1e9)
        with pytest.raises(NonFiniteLossError, match="the gradient is not finite") as seen_late:
            train(late, self.weighting(calm), unread=calm.num_updates)
        for error, student in ((caught, at_once.student), (seen_late, late.student)):
            assert (error.value.iteration, error.value.branch) == (iteration, branch)
            assert error.value.interval == where.get("interval")
            assert all(torch.equal(student.state_dict()[name], state[name]) for name in state)
        assert (load_tensors(path)[1]["iteration"] if path.exists() else 0) == iteration

    def test_evaluations_see_the_student_on_its_way_and_change_nothing(self, tmp_path):
        whole = train(self.learning(), self.weighting(self.learning()))
        seen: dict[int, NetworkDenoiser] = {}

        def evaluate(after: int, student: NetworkDenoiser) -> None:
            torch.rand(3)
            seen[after] = student
            with torch.no_grad():
                next(student.parameters()).add_(1)  # it is a copy

        stage = self.learning()
        student = train(stage, self.weighting(stage), evaluations=Evaluations((2, 4), evaluate))
        assert same_weights(student, whole)
        assert sorted(seen) == [2, 4]
        assert all(each.num_branches == 1 and not each.training for each in seen.values())

    def test_a_run_resumed_at_an_evaluation_is_evaluated_again(self, tmp_path):
        stage, seen = self.learning(), []
        keep = {"checkpoint": tmp_path / "x.safetensors", "checkpoint_seconds": 1e6}

        def stop_at_4(after: int, student: NetworkDenoiser) -> None:
            seen.append((after, denoiser_sha256(student)))
            if len(seen) == 2:
                raise KilledError

        def run() -> NetworkDenoiser:
            evaluations = Evaluations((2, 4), stop_at_4)
            return train(stage, self.weighting(stage), evaluations=evaluations, **keep)

        with pytest.raises(KilledError):
            run()
        run()
        assert [after for after, _ in seen] == [2, 4, 4]
        assert seen[1] == seen[2]


@torch.no_grad()
def outputs(student: NetworkDenoiser) -> Tensor:
    """Every branch at four noise levels."""
    c, h, w = student.image_shape
    like = next(student.parameters())
    x = torch.randn(4, c, h, w, generator=torch.Generator().manual_seed(0)).to(like)
    sigma = torch.tensor([0.01, 0.5, 5.0, 40.0]).to(like)
    told = {"num_points": 3} if student.step_condition else {}
    return student.branches(x * sigma.view(-1, 1, 1, 1), sigma, **told)


class MethodContract(TrainingContract):
    """A method with small knobs: its first branched stage has five updates or more."""

    method: ClassVar[type[Method]]
    # Of the smallest run.
    knobs: ClassVar[dict[str, Any]]
    # Values to try where the declaration does not show one that fits.
    others: ClassVar[dict[str, tuple[Any, ...]]] = {}

    def teacher(self) -> NetworkDenoiser:
        """Small, with dropout in its network."""
        raise NotImplementedError

    def inputs(self, seed: int = 5) -> Inputs:
        return Inputs(seed=seed)

    def config(self, **changes: Any) -> Any:
        return self.method.Config(**self.knobs | changes)

    def learning(self, seed: int = 5, **changes: Any) -> Training:
        method, config, teacher = self.method(), self.config(**changes), self.teacher()
        plan = next(plan for plan in method.plan(config, teacher) if plan.branched)
        return method.stage(plan, teacher, config, self.inputs(seed))

    def run(self, folder: Path, seed: int = 5, **options: Any) -> list[TrainedStage]:
        """All stages, kept in the folder."""
        changes = {name: options.pop(name) for name in list(options) if name in self._names()}
        config = self.config(**changes)
        k = config.num_branches
        return list(
            distill(
                self.method(),
                self.teacher(),
                config,
                lambda: FixedWeights(torch.linspace(0.5, 1.5, k, dtype=torch.float64)),
                self.inputs(seed),
                folder=folder,
                **options,
            )
        )

    def _names(self) -> set[str]:
        return set(knobs_of(self.method.Config))

    # ---- stages ----

    def test_plan_and_stages_agree(self):
        method, config, teacher = self.method(), self.config(), self.teacher()
        plans = method.plan(config)
        assert (
            len({plan.name for plan in plans}) == len({plan.nfe for plan in plans}) == len(plans)
        )
        assert method.plan(config, teacher) == plans
        for plan in plans:
            stage = method.stage(plan, teacher, config, self.inputs())
            assert stage.num_updates == plan.num_updates
            assert stage.sampler.nfe == plan.nfe
            assert stage.num_branches == (config.num_branches if plan.branched else 1)
            assert stage.batch_size == config.batch
            assert samplers_from(stage.metadata())[0] == stage.sampler
            assert stage.optimisation == config

    def test_the_last_branch_alone_is_plain_distillation(self):
        """Weight 0 for the others: to rounding, as a wider head is another product."""
        stage = self.learning(dropout=False, lr=self.rate)
        if stage.num_branches == 1:
            pytest.skip("there is one branch")
        alone = torch.zeros(stage.num_branches, dtype=torch.float64)
        alone[-1] = 1
        branched = export_branch(train(stage, FixedWeights(alone)))
        plain = train(self.learning(dropout=False, lr=self.rate), FixedWeights(ONE))
        a, b, start = outputs(branched), outputs(plain), outputs(stage.start)
        assert (a - b).abs().max() < 1e-2 * (b - start).abs().max()

    def test_images_take_weights_of_their_own_or_none_can_be_told_any(self):
        """Equal ones make the loss of fixed weights; a config that is told is only longer."""
        config = self.config()
        try:
            longer = config.for_one_shot(2.0)
        except InputError:
            return  # and a study of it is refused
        plans = (self.method().plan(each) for each in (config, longer))
        for short, long in zip(*plans, strict=True):
            assert long.num_updates == 2 * short.num_updates
        stage = self.learning(dropout=False)
        stage.begin(student := widen_head(stage.start, stage.num_branches))
        weights = torch.linspace(0.5, 1.5, stage.num_branches, dtype=torch.float64)
        losses = next(stage.updates(0, stage.batch(0, ALL)))(student.branches)
        by_image = weights[:, None].expand(-1, stage.batch_size)
        usual, own = losses.weighted(weights), losses.weighted(by_image)
        assert float(own) == pytest.approx(float(usual), rel=1e-5)

    def test_weights_of_another_number_are_refused(self):
        stage = self.learning()
        count = stage.num_branches + 1
        with pytest.raises(InputError, match=f"there are {count} branch weights"):
            train(stage, FixedWeights(torch.ones(count)))

    def averaged(self, **options: Any) -> tuple[Watched, list[dict[str, Tensor]], NetworkDenoiser]:
        """A stage, the student's weights after each iteration, and what is returned."""
        stage = Watched(self.learning(**options))
        steps: list[dict[str, Tensor]] = []

        def note(_) -> None:
            steps.append(copy.deepcopy(stage.student.state_dict()))

        result = train(stage, self.weighting(stage), on_iteration=note)
        assert not same_weights(result, stage.student)
        return stage, steps, result

    def test_the_average_of_the_weights_is_what_is_returned(self):
        """A halflife of one batch halves every share."""
        stage, steps, averaged = self.averaged(ema=self.config().batch)
        expected = widen_head(stage.start, stage.num_branches).state_dict()
        for step in steps:
            expected = {name: expected[name].lerp(step[name], 0.5) for name in step}
        for name, value in averaged.state_dict().items():
            torch.testing.assert_close(value, expected[name])

    def test_the_mean_over_the_last_half_is_what_is_returned(self):
        _, steps, averaged = self.averaged(tail=0.5)
        last = steps[round(len(steps) / 2) :]
        for name, value in averaged.state_dict().items():
            torch.testing.assert_close(value, torch.stack([s[name] for s in last]).mean(0))

    # ---- memory ----

    @pytest.mark.parametrize(
        ("name", "devices"),
        [
            ("fixed", None),
            ("alignment", None),
            pytest.param("fixed", TWO_CPUS, marks=pytest.mark.slow),
        ],
    )
    def test_accumulated_gradients_are_those_of_the_whole_batch(self, devices, name):
        """As between devices; a rule that learns sees the whole batch, too."""
        if name not in self.weightings():
            pytest.skip(f"{self.method.name} has no branches to weigh")
        batch = 4 if devices is None else 8
        stages = [
            self.learning(dropout=False, lr=self.rate, accumulate=parts, batch=batch)
            for parts in (1, 2)
        ]
        self.assert_equal_to_rounding(
            self.weightings()[name], *zip(stages, (None, devices), strict=True)
        )

    def test_a_batch_that_has_no_such_parts_is_refused(self):
        with pytest.raises(InputError, match="accumulate 3 parts cannot share batch=4"):
            self.learning(accumulate=3, batch=4)

    # ---- knobs ----

    @pytest.mark.parametrize("beside", [{}, {"optimizer": "sgd"}, {"schedule": "logsnr"}])
    def test_every_knob_changes_the_students_or_is_refused(self, tmp_path, beside):
        """Whatever changes a student's weights makes another identity, too."""
        if not beside.keys() <= self._names():
            pytest.skip(f"{self.method.name} has no knob {', '.join(beside)}")
        base = self._told(self.run(tmp_path / "base", **beside), beside)
        idle = []
        for name, known in knobs_of(self.method.Config).items():
            found = [name in beside]
            for i, value in enumerate(() if name in beside else self._values(name, known)):
                changes = beside | {name: value}
                try:
                    done = self.run(tmp_path / f"{name}-{i}", **changes)
                except InputError:
                    found.append(True)
                    continue
                told = self._told(done, changes)
                found.append(_made(told) != _made(base))
                for stage, (described, student, _) in told.items():
                    if stage in base and base[stage][1] != student:
                        assert base[stage][0] != described, f"{name}={value} is not described"
            if not any(found) and name != "accumulate":  # which moves rounding at most
                idle.append(name)
        assert idle == []

    def _told(
        self, stages: list[TrainedStage], changes: dict[str, Any]
    ) -> dict[str, tuple[str, str, str]]:
        """By name: what a stage says of itself, its student, how that draws."""
        method, config, teacher = self.method(), self.config(**changes), self.teacher()
        found = {}
        for done in stages:
            stage = method.stage(done.plan, teacher, config, self.inputs())
            told = json.dumps(stage.describe(self.weighting(stage)), sort_keys=True)
            drawn = json.dumps(done.sampler.describe())
            found[done.plan.name] = (told, denoiser_sha256(done.student), drawn)
            teacher = done.student
        return found

    def _values(self, name: str, known: Knob) -> tuple[Any, ...]:
        """Other values of a knob, from its declaration."""
        usual = self.knobs.get(name, known.default)
        if name in self.others:
            return self.others[name]
        if name in SHARED_OTHERS:
            return SHARED_OTHERS[name]
        if known.choices:
            return tuple(choice for choice in known.choices if choice != usual)
        if known.type is bool:
            return (not usual,)
        if known.type is int:
            return ((usual if usual is not None else int(known.low or 0)) + 1,)
        if known.type is float:
            return (usual * 1.5 if usual else float(known.low or 0) + 0.5,)
        raise AssertionError(f"{self.method.name} has a knob {name} of {known.type}: give others")

    # ---- a whole run ----

    def test_students_are_kept_and_read_back_without_training(self, tmp_path):
        plans: list[tuple[StagePlan, int]] = []
        first = self.run(
            tmp_path, on_iteration=lambda plan, done: plans.append((plan, done.iteration))
        )
        assert plans == [(done.plan, i) for done in first for i in range(done.plan.num_updates)]

        def never(*_):
            raise AssertionError("it trains")

        for done, again in zip(first, self.run(tmp_path, on_iteration=never), strict=True):
            assert (done.plan, done.path, done.sampler) == (again.plan, again.path, again.sampler)
            assert same_weights(done.student, again.student)
            kept, metadata = load_denoiser(done.path)
            assert same_weights(kept, done.student)
            assert samplers_from(metadata)[0] == done.sampler
            assert metadata["kind"] == "student"
            assert metadata["teacher_sha256"] == denoiser_sha256(self.teacher())
            assert done.path.with_suffix(".md").exists()
            assert done.student.describe() == again.student.describe()
            assert (done.student.num_branches, done.student.training) == (1, False)
        kinds = {path.name.split(".", 1)[1] for path in tmp_path.iterdir()}
        assert kinds == {"md", "safetensors"}
        with pytest.raises(CheckpointError, match=r"another run \(differs in: .*lr"):
            self.run(tmp_path, lr=0.5)

    def test_a_run_killed_in_its_last_stage_resumes_there(self, tmp_path):
        *_, whole = self.run(tmp_path / "whole")
        last = whole.plan

        def kill(plan, done):
            if (plan, done.iteration) == (last, 2):
                raise KilledError

        with pytest.raises(KilledError):
            self.run(tmp_path, on_iteration=kill, checkpoint_seconds=0)
        seen = []
        *_, resumed = self.run(
            tmp_path, on_iteration=lambda plan, done: seen.append((plan, done.iteration))
        )
        assert seen == [(last, i) for i in range(2, last.num_updates)]
        assert same_weights(resumed.student, whole.student)


def _made(told: Mapping[str, tuple[str, str, str]]) -> dict[str, tuple[str, ...]]:
    """The students and how they draw, whatever is said of them."""
    return {stage: made for stage, (_, *made) in told.items()}


SHARED_OTHERS: dict[str, tuple[Any, ...]] = {
    "betas": ((0.8, 0.99),),
    "warmup_images": (64,),
    "weight_decay": (0.1,),
    "ema": (8.0,),
    "tail": (0.5,),
    "clip_norm": (0.01,),
    "lora_targets": (("to_v",),),
}
