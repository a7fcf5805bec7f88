"""Few-step students of diffusion teachers by branched distillation (arXiv 2602.15971).

The public names, loaded when first used: ``import bdense`` alone does not import torch.
"""

import importlib
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bdense.data.datasets import load_dataset as load_dataset
    from bdense.diffusion import SOLVERS as SOLVERS
    from bdense.diffusion.branches import export_branch as export_branch
    from bdense.diffusion.branches import recombine_branches as recombine_branches
    from bdense.diffusion.pictures import save_grid as save_grid
    from bdense.diffusion.sampling import Sampler as Sampler
    from bdense.diffusion.sampling import draw_images as draw_images
    from bdense.diffusion.sampling import samplers_from as samplers_from
    from bdense.diffusion.schedules import Schedule as Schedule
    from bdense.methods import METHODS as METHODS
    from bdense.methods.distill import distill as distill
    from bdense.methods.method import Inputs as Inputs
    from bdense.methods.method import Recordings as Recordings
    from bdense.methods.progressive import PDConfig as PDConfig
    from bdense.methods.sfd import SFDConfig as SFDConfig
    from bdense.metrics.extractors import load_extractor as load_extractor
    from bdense.metrics.metrics import measure_images as measure_images
    from bdense.metrics.records import FID as FID
    from bdense.metrics.references import dataset_reference as dataset_reference
    from bdense.metrics.references import read_reference as read_reference
    from bdense.models.folder import export_folder as export_folder
    from bdense.models.hub import push_model as push_model
    from bdense.models.latents import load_codec as load_codec
    from bdense.models.latents import load_text_encoder as load_text_encoder
    from bdense.models.store import load_denoiser as load_denoiser
    from bdense.models.store import load_model as load_model
    from bdense.models.store import save_denoiser as save_denoiser
    from bdense.networks import NETWORKS as NETWORKS
    from bdense.training.loop import train as train
    from bdense.training.teacher import TeacherConfig as TeacherConfig
    from bdense.training.teacher import train_teacher as train_teacher
    from bdense.weights import WEIGHT_SPACES as WEIGHT_SPACES
    from bdense.weights.log_linear import LogLinearWeights as LogLinearWeights
    from bdense.weights.log_linear import normalised_weights as normalised_weights
    from bdense.weights.log_linear import uniform_weights as uniform_weights
    from bdense.weights.weighting import FixedWeights as FixedWeights
    from bdense.weights.weighting import LearnedWeights as LearnedWeights

# Raised by hand whenever a golden or the digits result moves: results of different numerics are
# never compared.
NUMERICS = 2

# By module; type checkers read the imports above.
_NAMES = {
    "data.datasets": "load_dataset",
    "diffusion": "SOLVERS",
    "diffusion.branches": "export_branch recombine_branches",
    "diffusion.pictures": "save_grid",
    "diffusion.sampling": "Sampler draw_images samplers_from",
    "diffusion.schedules": "Schedule",
    "methods": "METHODS",
    "methods.distill": "distill",
    "methods.method": "Inputs Recordings",
    "methods.progressive": "PDConfig",
    "methods.sfd": "SFDConfig",
    "metrics.extractors": "load_extractor",
    "metrics.metrics": "measure_images",
    "metrics.records": "FID",
    "metrics.references": "dataset_reference read_reference",
    "models.folder": "export_folder",
    "models.hub": "push_model",
    "models.latents": "load_codec load_text_encoder",
    "models.store": "load_denoiser load_model save_denoiser",
    "networks": "NETWORKS",
    "training.loop": "train",
    "training.teacher": "TeacherConfig train_teacher",
    "weights": "WEIGHT_SPACES",
    "weights.log_linear": "LogLinearWeights normalised_weights uniform_weights",
    "weights.weighting": "FixedWeights LearnedWeights",
}
_HOME = {name: home for home, names in _NAMES.items() for name in names.split()}
__all__ = [*_HOME, "NUMERICS"]


def __getattr__(name: str) -> Any:  # noqa: ANN401  PEP 562
    if name not in _HOME:
        raise AttributeError(f"module 'bdense' has no attribute {name!r}")
    found = getattr(importlib.import_module(f"bdense.{_HOME[name]}"), name)
    if isinstance(found, types.FunctionType):
        from bdense.arguments import checked

        found = checked(found)
        found.__module__ = __name__  # where pickle looks for it
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
