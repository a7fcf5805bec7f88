"""What a worker does with a row: from weights to a FID."""
