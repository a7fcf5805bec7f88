"""Data sets and the files they are read from."""
