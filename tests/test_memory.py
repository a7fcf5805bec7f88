"""What a trial takes of its device is foretold, from the shapes alone, and refused in words."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parameter import Parameter

import search.worker.free_memory
import search.worker.memory
import search.worker.student_calls
from bdense.diffusion.branches import widen_head
from bdense.errors import InputError
from bdense.methods.sfd import branch_losses, branch_states
from search.spec.study_spec import StudySpec
from search.worker.engine import student_grid
from search.worker.free_memory import free_bytes
from search.worker.memory import Memory, trial_memory
from search.worker.student_calls import _LiveBytes
from tests.small import small_teacher
from tests.studies import spec

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GIB = 2**30


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """A block takes what it holds; what a heap adds was measured, and has its own test."""
    monkeypatch.setattr(search.worker.student_calls, "_HEAP_SHARE", 1.0)


def memory_of(**keys) -> Memory:
    return trial_memory(spec(**keys), small_teacher().describe(), CPU)


def test_what_is_alive_at_once_is_counted_by_hand():
    with FakeTensorMode():
        x = torch.zeros(1000)  # was there before: no part of it
        live = _LiveBytes()
        with live:
            y = x * 2
            y.add_(1).view(10, 100)  # the same memory
            del y
            z = torch.cat([x, x])
            del z
    # The sum of 4000 bytes and 8000 would be wrong: the first were gone.
    assert live.peak == 8000


def test_what_a_backward_pass_needs_is_alive():
    with FakeTensorMode():
        x = torch.zeros(1000, requires_grad=True)
        live = _LiveBytes()
        with live:
            x.exp().exp().exp()  # each keeps its result
    assert live.peak == 12000


def test_a_small_block_takes_more_than_it_holds(monkeypatch):
    monkeypatch.setattr(search.worker.student_calls, "_HEAP_SHARE", 1.5)
    monkeypatch.setattr(search.worker.student_calls, "_HEAP_BLOCK", 4000)
    with FakeTensorMode():
        live = _LiveBytes()
        with live:
            small, large = torch.zeros(1000), torch.zeros(2000)
        assert (small.numel(), large.numel()) == (1000, 2000)
    assert live.peak == 6000 + 8000


def test_parameters_and_their_moments_are_four_bytes_each():
    teacher = small_teacher()
    found = memory_of()
    # The embedding's frequencies and the filters are buffers.
    tensors = [*teacher.parameters(), *teacher.buffers()]
    assert found.teacher == 4 * sum(t.numel() for t in tensors)
    head = teacher.get_submodule(f"model.{teacher.model.head_name}")
    more = 3 * 4 * sum(p.numel() for p in head.parameters())  # three branches more
    assert found.student == found.teacher + more
    assert (found.gradients, found.adam) == (found.student, 2 * found.student)


def test_activations_are_those_of_a_real_update():
    """Counted here in another way: what autograd keeps of a real forward pass."""
    study = spec()
    grid, student = student_grid(study), widen_head(small_teacher(), 4).train()
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, Parameter):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage
        return tensor

    x = torch.randn(64, *student.image_shape)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states = branch_states(student.branches, x, grid.interval(1))
        branch_losses(states, x.expand(4, *x.shape)).sum()
    saved = sum(storage.nbytes() for storage in kept.values())
    walk = (grid.num_rows + 1) * x.nbytes
    counted = memory_of().activations - walk
    # More by what a step of the way needs besides, and no less.
    assert saved <= counted <= 1.25 * saved


def test_activations_grow_with_the_batch():
    one, two, four = (memory_of(budget__batch=batch).activations for batch in (64, 128, 256))
    assert (four - two) / (two - one) == pytest.approx(2, rel=0.01)


def test_half_precision_halves_the_activations():
    full, half = (memory_of(precision=p).activations for p in ("float32", "bfloat16"))
    assert 0.4 * full < half < 0.75 * full


def test_a_team_shares_the_batch_and_exchanges_gradients():
    alone, two = memory_of(), memory_of(resources={"gpus": 2})
    assert two.activations == memory_of(budget__batch=32).activations < alone.activations
    assert two.gradients == 2 * alone.gradients


def test_evaluation_holds_the_images_and_their_features():
    few, many = memory_of(), memory_of(evaluation__images=200_000)
    # On a CPU: 64 features in float32, in float64, and centred, beside a byte a pixel.
    assert many.evaluation - few.teacher >= 200_000 * (64 * 20 + 64)
    large = memory_of(evaluation__extractor="inception")
    assert large.evaluation > 256 * 13.2 * 2**20


def test_kid_and_precision_hold_the_references_features_too():
    keys = {"evaluation__images": 100_000}
    fid = memory_of(**keys).evaluation
    for data, images in (("digits", 1797), ("fashion-mnist@32", 60_000), ("zip:some.zip", 60_000)):
        more = memory_of(**keys, data=data, evaluation__metrics=["fid", "kid"]).evaluation
        assert more - fid == images * 64 * 12


def test_the_total_is_the_worse_of_training_and_evaluation():
    sizes = {"runtime": 1, "teacher": 10, "student": 20, "gradients": 20, "adam": 40}
    training = Memory(**sizes, activations=1000, evaluation=500)
    assert (training.total, training.at_the_most) == (51 + 1040, "training")
    evaluation = Memory(**sizes, activations=1000, evaluation=1041)
    assert (evaluation.total, evaluation.at_the_most) == (51 + 1041, "evaluation")


def test_a_look_takes_its_memory_beside_adam():
    sizes = {"runtime": 1, "teacher": 10, "student": 20, "gradients": 20, "adam": 40}
    look = Memory(**sizes, activations=1000, evaluation=1041, look=1002)
    assert (look.total, look.at_the_most) == (51 + 1042, "look")
    less = Memory(**sizes, activations=1000, evaluation=1041, look=1000)
    assert (less.total, less.at_the_most) == (51 + 1041, "evaluation")


@pytest.mark.parametrize("images", [64, 200_000])
def test_a_look_holds_a_branch_its_images_and_their_features_by_fid_alone(images):
    """As much as an evaluation of as many images, which holds an exported student too."""
    keys = {"evaluation__metrics": ["fid", "kid"], "evaluation__images": 200_000}
    looked = memory_of(**keys, pruning={"at": [0.5], "images": images})
    assert looked.look == memory_of(evaluation__images=images).evaluation
    # The reference's features, for KID alone.
    kid = 1797 * 64 * 12
    assert looked.evaluation == memory_of(evaluation__images=200_000).evaluation + kid
    assert dataclasses.replace(looked, look=0) == memory_of(**keys)


def test_a_look_draws_as_many_images_as_the_evaluation_unless_told():
    keys = {"evaluation__images": 200_000}
    looked, blind = memory_of(**keys, pruning={"at": [0.5]}), memory_of(**keys)
    assert looked.look == looked.evaluation == blind.evaluation
    # Adam waits.
    assert looked.total == blind.total + blind.adam


# ---- room ----


def memory(*, activations: float = 7.0, evaluation: float = 0.0, look: float = 0.0) -> Memory:
    """One of 8 GiB, if it is training that takes it."""
    parts = dict.fromkeys(("runtime", "teacher", "student", "gradients"), GIB // 4)
    gib = {"activations": activations, "evaluation": evaluation, "look": look}
    return Memory(**parts, adam=0, **{name: int(size * GIB) for name, size in gib.items()})


def shortage(study: StudySpec, device: torch.device, together: int, **sizes: float) -> str:
    return memory(**sizes).shortage(study, device, together)


@pytest.mark.parametrize(
    ("free", "device", "keys", "together", "expected"),
    [
        (8, CPU, {}, 1, ""),
        (16, CPU, {}, 2, ""),
        (
            7,
            CPU,
            {},
            1,
            "a trial needs about 8.00 GiB and this machine has 7.00 GiB free; lower budget.batch "
            "(64 now)",
        ),
        (
            12,
            CPU,
            {},
            2,
            "a trial needs about 8.00 GiB and this machine has 6.00 GiB free for each of 2 trials "
            "at once; lower budget.batch (64 now), or run fewer trials at once (2 now) by "
            "--workers",
        ),
        # A GPU each: how many there are at once does not matter.
        (8, CUDA, {}, 4, ""),
        (8, CUDA, {"gpus": 1}, 4, ""),
        (
            7,
            CUDA,
            {"gpus": 1},
            4,
            "a trial needs about 8.00 GiB and the GPU has 7.00 GiB free; lower budget.batch "
            "(64 now), or share each batch by resources.gpus: 2",
        ),
        # Four share one, if there are as many.
        (16, CUDA, {"gpus": 0.25}, 2, ""),
        (
            16,
            CUDA,
            {"gpus": 0.25},
            8,
            "a trial needs about 8.00 GiB and the GPU has 4.00 GiB free for each of 4 trials at "
            "once; lower budget.batch (64 now), or run fewer trials at once (4 now) by --workers, "
            "or give each more of a GPU by resources.gpus (0.25 now)",
        ),
    ],
)
def test_too_little_room_is_named_with_the_way_out(
    monkeypatch, free, device, keys, together, expected
):
    monkeypatch.setattr(search.worker.memory, "free_bytes", lambda _: free * GIB)
    assert shortage(spec(resources=keys), device, together) == expected


def test_where_evaluation_takes_it_its_batch_is_named(monkeypatch):
    monkeypatch.setattr(search.worker.memory, "free_bytes", lambda _: GIB)
    told = shortage(spec(), CPU, 1, activations=1.0, evaluation=7.0)
    assert told.endswith("; lower evaluation.batch (128 now) or evaluation.images (256 now)")


def test_where_a_look_takes_it_its_images_are_named(monkeypatch):
    monkeypatch.setattr(search.worker.memory, "free_bytes", lambda _: GIB)
    study = spec(pruning={"at": [0.5], "images": 200})
    told = shortage(study, CPU, 1, activations=1.0, evaluation=7.0, look=7.5)
    assert told.endswith("; lower evaluation.batch (128 now) or pruning.images (200 now)")


def test_a_launch_is_refused_before_anything_is_made(monkeypatch):
    monkeypatch.setattr(search.worker.memory, "free_bytes", lambda _: GIB)
    with pytest.raises(InputError, match=r"^study digits: a trial needs about 8\.00 GiB and th"):
        memory().require_room(spec(), CPU, 1)


def test_a_system_that_does_not_say_refuses_nothing(monkeypatch):
    monkeypatch.setattr(search.worker.memory, "free_bytes", lambda _: None)
    assert shortage(spec(), CPU, 100) == ""


def test_the_free_memory_is_no_more_than_there_is():
    free = free_bytes(CPU)
    if free is None:
        pytest.skip("no /proc/meminfo on this system")
    with open("/proc/meminfo") as known:  # noqa: PTH123
        total = int(known.readline().split()[1]) * 1024
    assert 0 < free <= total


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"memory.max": "max", "memory.current": "5000"}, None),
        ({"memory.max": "9000", "memory.current": "5000"}, 4000),
        (
            {
                "memory.max": "9000",
                "memory.current": "5000",
                "memory.stat": "anon 3000\nactive_file 500\ninactive_file 1500",
            },
            6000,
        ),
        (
            {
                "memory/memory.limit_in_bytes": "9000",
                "memory/memory.usage_in_bytes": "5000",
                "memory/memory.stat": "inactive_file 0\ntotal_inactive_file 1000",
            },
            5000,
        ),
        # More than there is, as v1 says where there is no limit.
        (
            {
                "memory/memory.limit_in_bytes": "9223372036854771712",
                "memory/memory.usage_in_bytes": "5000",
            },
            None,
        ),
        ({"memory.max": "4000", "memory.current": "5000"}, 0),
    ],
)
def test_a_containers_limit_counts(tmp_path, monkeypatch, files, expected):
    if not Path("/proc/meminfo").exists():
        pytest.skip("no /proc/meminfo on this system")
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    monkeypatch.setattr(search.worker.free_memory, "_CGROUP", tmp_path)
    free = free_bytes(CPU)
    assert free == expected if expected is not None else free > 2**20


def test_the_line_names_the_parts():
    line = dataclasses.replace(memory(), adam=5 * 2**20).line(spec())
    assert re.fullmatch(
        r"memory: about 8\.00 GiB for one trial \(teacher 0\.25 GiB, parameters 0\.25 GiB, "
        r"Adam 5 MiB, gradients 0\.25 GiB, activations of batch 64 7\.00 GiB, evaluation, after "
        r"Adam and activations 0 MiB, runtime 0\.25 GiB\)",
        line,
    )
    looked = memory(look=0.5).line(spec())
    assert "Adam and activations 0 MiB, a look on the way, after activations 0.50 GiB, " in looked
    shared = memory().line(spec(resources={"gpus": 2}))
    assert "for one trial on each of its GPUs (" in shared
    assert "activations of batch 32 " in shared
