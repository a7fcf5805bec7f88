"""The training loop and what it needs: checkpoints, several devices, teachers."""
