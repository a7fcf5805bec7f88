"""What a promotion's dry run says: its cost by hand counts, and nothing downloaded for it."""

import dataclasses
import re

import pytest
import torch
from torch.nn.parameter import Parameter

import search.worker.chain_estimate
import search.worker.estimate
import search.worker.memory
import search.worker.student_calls
from bdense.diffusion.branches import widen_head
from bdense.diffusion.denoiser import NetworkDenoiser, build_denoiser
from bdense.methods.progressive import branch_errors, dense_targets
from search.spec.promotion_spec import PromotionSpec
from search.spec.study_file import read_promotion
from search.worker.chain_engine import check_promotion
from search.worker.chain_estimate import chain_memory, chains_work, estimate_promotion
from search.worker.engine import architecture
from search.worker.estimate import Work
from search.worker.memory import trial_memory
from search.worker.row_words import words_of
from tests.studies import PROMOTIONS, promotion, spec

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DDPM = {"name": "ddpm", "num_train_timesteps": 64, "beta_end": 0.2}


@pytest.fixture(autouse=True)
def nothing_here(tmp_path, monkeypatch):
    """Empty folders, plenty of room, exact counts, and no time to lose."""
    for variable in ("BDENSE_CHECKPOINTS", "BDENSE_RUNS", "BDENSE_DATA", "TORCH_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    monkeypatch.setattr(search.worker.memory, "free_bytes", lambda _: 2**50)
    monkeypatch.setattr(search.worker.student_calls, "_HEAP_SHARE", 1.0)
    monkeypatch.setattr(search.worker.estimate, "MEASURE_SECONDS", 0.01)


WIDE = {
    "teacher__train__network": {"model_channels": 128, "channel_mult": [1, 2], "num_blocks": 1}
}


def teacher_of(given: PromotionSpec) -> NetworkDenoiser:
    with torch.device("meta"):
        return build_denoiser(architecture(given))


def work_of(arms: int, **keys) -> Work:
    given = promotion(**keys)
    return chains_work(given, teacher_of(given), arms)


def students_of(count: int) -> str:
    """Their line, of the wide network."""
    parameters = sum(p.numel() for p in teacher_of(promotion(**WIDE)).parameters())
    mib = count * 4 * parameters / 2**20
    assert mib > 10
    return f"disk: {mib:,.0f} MiB of students, one a round and chain"


def test_a_chain_counted_by_hand():
    """8 -> 4 -> 2 at K = 2: two rounds of 10 updates of 64 images; three arms, three seeds."""
    work = work_of(3, **WIDE)
    assert work.updates == 10_000 + 9 * 2 * 640
    assert work.evaluations == 256 * 8 + 9 * (2 * 640 * 2 + 256 * (4 + 2))
    assert work.lines == (
        "chains: 9 of 2 students each, at 4, 2 steps",
        "network evaluations, in images: 2,048 of the teacher for its own FID; 1,280 "
        "forward+backward and 2,560 forward for targets and 1,536 forward for FIDs for each "
        "chain; 10,000 forward+backward to train the teacher",
        students_of(2 * 9),
    )


def test_four_teacher_steps_a_student_step():
    work = work_of(1, chain={"first": 16, "last": 1, "substeps": 4})
    assert work.lines[0] == "chains: 3 of 2 students each, at 4, 1 steps"
    assert f" and {2 * 640 * 4:,} forward for targets and " in work.lines[1]
    (alone, *_) = work_of(1, chain={"first": 4, "last": 1, "substeps": 4}).lines
    assert alone == "chains: 3 of 1 student each, at 1 steps"


def test_another_prediction_type_costs_a_round_at_the_teachers_steps():
    work = work_of(2, prediction_type="sample", **WIDE)
    assert work.lines == (
        "chains: 6 of 3 students each, at 8, 4, 2 steps",
        f"network evaluations, in images: 2,048 of the teacher for its own FID; {3 * 640:,} "
        f"forward+backward and {640 + 2 * 640 * 2:,} forward for targets and "
        f"{256 * (8 + 4 + 2):,} forward for FIDs for each chain; 10,000 forward+backward to train "
        "the teacher",
        students_of(3 * 6),
    )
    assert work_of(2, prediction_type="v_prediction").lines[0].endswith(" at 4, 2 steps")


def test_time_is_all_of_it():
    measured = estimate_promotion(promotion(seeds={"training": [4]}), arms=2)
    assert measured.forward_seconds > 0
    assert measured.update_seconds > 0
    assert measured.remarks == ()
    cost = dataclasses.replace(measured, forward_seconds=1.0, update_seconds=10.0)
    assert cost.workers_seconds == 2048 + 100_000 + 2 * (2560 + 1536 + 12_800)


def test_the_lines_name_the_parts(monkeypatch):
    monkeypatch.setattr(search.worker.chain_estimate, "image_seconds", lambda *_: (1e-3, 3e-3))
    *work, memory, time = estimate_promotion(promotion(), arms=3).lines()
    assert tuple(work) == work_of(3).lines
    assert memory.startswith("memory: about ")
    assert " for one chain (teacher " in memory
    assert " activations of batch 64 " in memory
    assert re.fullmatch(
        r"time: at most 1 min \d+ s of one worker, measured for 0\.01 s on 1 CPU thread\(s\) "
        r"\(1 ms forward, 3 ms forward\+backward an image\)",
        time,
    )


# ---- memory ----


def memory_of(**keys) -> search.worker.memory.Memory:
    given = promotion(**keys)
    return chain_memory(given, architecture(given), CPU)


def test_parameters_and_what_the_optimiser_keeps():
    given, wide = promotion(), build_denoiser(architecture(promotion()) | {"num_branches": 2})
    found = memory_of()
    tensors = [*wide.parameters(), *wide.buffers()]
    assert found.student == 4 * sum(t.numel() for t in tensors)
    assert found.teacher == trial_memory(spec(), architecture(given), CPU).teacher
    assert (found.gradients, found.adam) == (found.student, 2 * found.student)
    assert memory_of(round__optimizer="sgd").adam == 0


def test_the_data_stay_in_the_process():
    runtime = trial_memory(spec(), architecture(promotion()), CPU).runtime
    assert memory_of().runtime - runtime == 1797 * 64


def test_activations_are_those_of_a_real_update():
    """Counted here in another way: what autograd keeps, beside the predictions and the batch."""
    student = widen_head(build_denoiser(architecture(promotion())), 2).train(False)
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, Parameter):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage
        return tensor

    x, levels = torch.randn(64, *student.image_shape), torch.tensor([[3.0], [2.0], [1.0]])
    levels = levels.double().expand(-1, 64)
    targets = dense_targets(student, x, levels)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        branch_errors(student.branches, x, levels[0], targets)
    needed = sum(storage.nbytes() for storage in kept.values()) + targets.nbytes + 3 * x.nbytes
    assert needed <= memory_of().activations <= 1.3 * needed


def test_dropout_takes_room_only_where_it_is_kept():
    network = {"model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "dropout": 0.1}
    off, on = (
        memory_of(teacher__train__network=network, round__dropout=dropout).activations
        for dropout in (False, True)
    )
    assert off < on


def test_a_ddpms_table_of_levels_keeps_its_numbers():
    """It is kept for the process's life, and the count is on tensors that have none."""
    given = promotion(teacher__train__precond=DDPM, chain={"first": 64, "last": 32})
    network = architecture(given)
    for count in (
        lambda: chain_memory(given, network, CPU),
        lambda: trial_memory(spec(), network, CPU),
    ):
        assert count().activations > 0
        denoiser = build_denoiser(network)
        x = torch.zeros(1, *denoiser.image_shape)
        assert bool(denoiser(x, torch.tensor(1.0)).isfinite().all())


def test_what_this_machine_cannot_do_is_said_and_not_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (told,) = estimate_promotion(promotion(resources={"gpus": 1}), arms=1).remarks
    assert told == "not on this machine: it has no GPU, and a chain asks for resources.gpus 1"
    monkeypatch.setattr(search.worker.memory, "free_bytes", lambda _: 2**20)
    (crowded,) = estimate_promotion(promotion(), arms=1).remarks
    assert re.fullmatch(
        r"not on this machine: a chain needs about 0\.\d+ GiB and this machine has 1 MiB free; "
        r"lower (round\.batch \(64 now\)|evaluation\.batch \(128 now\) or evaluation\.images "
        r"\(256 now\))",
        crowded,
    )


def test_a_chains_batch_is_not_shared_by_gpus(monkeypatch):
    monkeypatch.setattr(search.worker.memory, "free_bytes", lambda _: 2**20)
    told = dataclasses.replace(memory_of(), activations=2**40).shortage(promotion(), CUDA, 1)
    assert told.endswith(" GiB and the GPU has 1 MiB free; lower round.batch (64 now)")
    assert words_of(promotion()).name == "chain"
    assert words_of(spec()).name == "trial"


@pytest.mark.parametrize("path", PROMOTIONS, ids=lambda path: path.name)
def test_every_promotion_that_comes_along_runs_dry(path, tmp_path, monkeypatch):
    """Without its model, its data, the internet, or a GPU."""
    given = read_promotion(path)
    if given.teacher.checkpoint is not None:
        pytest.importorskip("diffusers", reason="needs the diffusers extra")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(search.worker.chain_estimate, "image_seconds", lambda *_: (1e-3, 3e-3))
    check_promotion(given)
    cost = estimate_promotion(given, arms=3)
    assert cost.lines()[0].startswith(f"chains: {3 * len(given.seeds.training)} of ")
    downloads = [line for line in cost.lines() if line.startswith("download: ")]
    if given.teacher.checkpoint is None:
        assert downloads == []
    else:
        model, weights = downloads
        assert model == (
            "download: the launch fetches https://huggingface.co/google/ddpm-cifar10-32 to "
            f"{tmp_path / 'hub' / 'models--google--ddpm-cifar10-32'} (about 136 MiB)"
        )
        assert "weights-inception-2015-12-05" in weights
    assert not (tmp_path / "hub").exists()
