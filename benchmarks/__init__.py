"""Measurements that print both sides of a comparison from one run; see each script's --help."""
