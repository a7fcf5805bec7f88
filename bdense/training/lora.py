"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685): a student that trains few weights.

The network stays as it is; each chosen layer W gets B A of rank r beside it, B zero at first, so
that the student starts as its teacher. The head is trained in full, as its branches must part,
but for its bias, which an adapter's file has no place for. Needs the ``lora`` extra.
"""

import copy
from typing import Any

import torch
from torch import nn

from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.errors import extra
from bdense.knobs import KnobError
from bdense.networks.diffusers_network import DiffusersNetwork
from bdense.randomness import Stream, seeded
from bdense.training.optimisation import OptimisationConfig

# The projections of attention, as diffusers' own scripts choose.
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def require_adaptable(network: nn.Module, config: OptimisationConfig) -> None:
    """Refuse adapters that a network cannot have."""
    if not config.lora_rank:
        return
    if not isinstance(network, DiffusersNetwork):
        raise KnobError(
            "lora_rank",
            f"{config.lora_rank} is for networks of diffusers, and this is a "
            f"{type(network).__name__}; take 0, which trains all weights",
        )
    with extra("lora", "lora_rank"):
        import peft  # noqa: F401
    layers = network.inner.named_modules()
    names = [name for name, layer in layers if isinstance(layer, nn.Linear | nn.Conv2d)]
    for target in config.lora_targets or TARGETS:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            there = [each for each in TARGETS if any(name.endswith(each) for name in names)]
            raise KnobError(
                "lora_targets",
                f"names {target}, and this {network.kind} has no such linear or convolutional "
                f"layer; of attention's it has {', '.join(there) or 'none, so name others'}",
            )


def add_adapters(student: NetworkDenoiser, config: OptimisationConfig, seed: int) -> None:
    """Freeze a student, but for new adapters and the weight of its head, in place.

    Args:
        student: Widened already.
        config: With ``lora_rank`` above 0.
        seed: Of the adapters' A.
    """
    from peft import LoraConfig, inject_adapter_in_model

    network: Any = student.model
    require_adaptable(network, config)
    student.requires_grad_(False)
    given = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_rank,  # B A itself, unscaled
        target_modules=list(config.lora_targets or TARGETS),
        init_lora_weights="gaussian",
    )
    # On the CPU, so that every device starts with the same numbers.
    device = next(student.parameters()).device
    model = network.inner.cpu()
    with seeded(torch.device("cpu"), seed, Stream.INITIALISATION, 3):
        inject_adapter_in_model(given, model)
    student.to(device)
    network.get_submodule(network.head_name).weight.requires_grad_(True)


def merged(student: NetworkDenoiser) -> NetworkDenoiser:
    """A copy of a student whose layers have taken up their adapters."""
    from peft.tuners.lora import LoraLayer

    whole = copy.deepcopy(student)
    for name, layer in list(whole.named_modules()):
        if isinstance(layer, LoraLayer):
            parent, _, own = name.rpartition(".")
            layer.merge()
            setattr(whole.get_submodule(parent), own, layer.get_base_layer())
    return whole.requires_grad_(True)
