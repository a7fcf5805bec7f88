"""Few-step students of diffusion teachers by branched distillation (arXiv 2602.15971)."""

# Raised by hand whenever a golden or the digits result moves: results of different numerics are
# never compared.
NUMERICS = 1
