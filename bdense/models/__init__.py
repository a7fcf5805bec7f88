"""Models on disk: our format, model folders and foreign checkpoints."""
