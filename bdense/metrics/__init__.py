"""FID and other metrics, their feature networks and reference statistics."""
