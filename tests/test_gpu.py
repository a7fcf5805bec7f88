"""What a GPU must agree on; skipped where torch sees none."""

import pytest
import torch

from bdense.branches import export_branch
from bdense.sampling import Sampler, draw_images
from bdense.sfd import SFDConfig, distill
from bdense.weights import LogLinearWeights
from tests.small import same_weights, small_teacher, small_trajectories

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]


def student_on(device: str):
    teacher = small_teacher().to(device)
    trajectories = small_trajectories(teacher)
    train = SFDConfig(num_branches=4, images=16, lr=1e-4)
    return export_branch(distill(teacher, trajectories, train, LogLinearWeights(a=1.0)(4)))


def test_students_of_cpu_and_gpu_agree_to_rounding():
    """Noise is drawn on the CPU, so both see the same batches; L1 signs may flip at kinks."""
    sampler = Sampler(num_intervals=3, afs=True)
    drawn = [draw_images(student_on(device), sampler, 16, seed=0) for device in ("cpu", "cuda")]
    difference = (drawn[0].int() - drawn[1].int()).abs().float()
    assert difference.mean() < 1.0


def test_a_deterministic_gpu_repeats_itself_bit_for_bit(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        assert same_weights(student_on("cuda"), student_on("cuda"))
    finally:
        torch.use_deterministic_algorithms(False)
