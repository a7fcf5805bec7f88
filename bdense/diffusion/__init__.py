"""Diffusion: noise levels, denoisers, solvers and samplers."""
