"""How far a network in another number format may be from float32."""

import torch

from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.execution import Execution

# Level: max |error| of an EDM network in float16 with the preconditioning in float32
# (goldens/sfd/README.md, section 1). tf32 has as many digits, bfloat16 three bits fewer.
FLOAT16_ERROR = {0.006: 4.9e-5, 0.5: 2.8e-3, 5.0: 3.1e-3, 80.0: 3.2e-3}
# Other images have other errors.
ROOM = 2.0


@torch.no_grad()
def errors(net: NetworkDenoiser, execution: Execution) -> dict[float, float]:
    """max |D - D in float32| at each level, on the network's device."""
    device = next(net.parameters()).device
    found = {}
    for sigma in FLOAT16_ERROR:
        draw = torch.Generator().manual_seed(0)
        clean, noise = (torch.randn(4, *net.image_shape, generator=draw) for _ in range(2))
        x, level = (0.5 * clean + sigma * noise).to(device), torch.tensor(sigma)
        exact = net.execute(Execution())(x, level)
        found[sigma] = float((net.execute(execution)(x, level) - exact).abs().max())
    net.execute(Execution())
    return found


def assert_within_bounds(net: NetworkDenoiser, execution: Execution) -> None:
    """Errors there are, and none above the known ones; tf32 may have none in small products."""
    rounds = execution.precision != "tf32"
    coarser = 8 if execution.precision == "bfloat16" else 1
    for sigma, error in errors(net, execution).items():
        bound = ROOM * coarser * FLOAT16_ERROR[sigma]
        assert error > 0 or not rounds, f"sigma {sigma}: nothing was rounded"
        assert error < bound, f"sigma {sigma}: off by {error:.3g}, allowed {bound:.3g}"
