"""Few-step students of diffusion teachers by branched distillation (arXiv 2602.15971).

The public names, loaded when first used: ``import bdense`` alone does not import torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bdense.branches import export_branch as export_branch
    from bdense.branches import widen_head as widen_head
    from bdense.chain import Chain as Chain
    from bdense.chain import distill_chain as distill_chain
    from bdense.checkpoints import load_denoiser as load_denoiser
    from bdense.checkpoints import save_denoiser as save_denoiser
    from bdense.data import load_dataset as load_dataset
    from bdense.ddpm import DDPMSchedule as DDPMSchedule
    from bdense.exports import export_folder as export_folder
    from bdense.extractors import load_extractor as load_extractor
    from bdense.intervals import IntervalGrid as IntervalGrid
    from bdense.metrics import FID as FID
    from bdense.metrics import measure_images as measure_images
    from bdense.progressive import DataBatches as DataBatches
    from bdense.progressive import PDConfig as PDConfig
    from bdense.progressive import distill_round as distill_round
    from bdense.recordings import TrajectoryStore as TrajectoryStore
    from bdense.references import dataset_reference as dataset_reference
    from bdense.references import read_reference as read_reference
    from bdense.sampling import Sampler as Sampler
    from bdense.sampling import draw_images as draw_images
    from bdense.sampling import samplers_from as samplers_from
    from bdense.sampling import save_grid as save_grid
    from bdense.schedules import Schedule as Schedule
    from bdense.sfd import SFDConfig as SFDConfig
    from bdense.sfd import distill as distill
    from bdense.solvers import DPMSolverPP as DPMSolverPP
    from bdense.solvers import Euler as Euler
    from bdense.sources import load_model as load_model
    from bdense.teachers import TeacherConfig as TeacherConfig
    from bdense.teachers import train_teacher as train_teacher
    from bdense.trajectories import LiveTrajectories as LiveTrajectories
    from bdense.vp import CosineSchedule as CosineSchedule
    from bdense.weights import LogLinearWeights as LogLinearWeights
    from bdense.weights import normalised_weights as normalised_weights
    from bdense.weights import uniform_weights as uniform_weights

# Raised by hand whenever a golden or the digits result moves: results of different numerics are
# never compared.
NUMERICS = 2

_HOME = {
    "FID": "metrics",
    "Chain": "chain",
    "CosineSchedule": "vp",
    "DDPMSchedule": "ddpm",
    "DPMSolverPP": "solvers",
    "DataBatches": "progressive",
    "Euler": "solvers",
    "IntervalGrid": "intervals",
    "LiveTrajectories": "trajectories",
    "LogLinearWeights": "weights",
    "PDConfig": "progressive",
    "SFDConfig": "sfd",
    "Sampler": "sampling",
    "Schedule": "schedules",
    "TeacherConfig": "teachers",
    "TrajectoryStore": "recordings",
    "dataset_reference": "references",
    "distill": "sfd",
    "distill_chain": "chain",
    "distill_round": "progressive",
    "draw_images": "sampling",
    "export_branch": "branches",
    "export_folder": "exports",
    "load_dataset": "data",
    "load_denoiser": "checkpoints",
    "load_extractor": "extractors",
    "load_model": "sources",
    "measure_images": "metrics",
    "normalised_weights": "weights",
    "read_reference": "references",
    "samplers_from": "sampling",
    "save_denoiser": "checkpoints",
    "save_grid": "sampling",
    "train_teacher": "teachers",
    "uniform_weights": "weights",
    "widen_head": "branches",
}
__all__ = [*_HOME, "NUMERICS"]


def __getattr__(name: str) -> Any:  # noqa: ANN401  PEP 562
    if name not in _HOME:
        raise AttributeError(f"module 'bdense' has no attribute {name!r}")
    return getattr(importlib.import_module(f"bdense.{_HOME[name]}"), name)
