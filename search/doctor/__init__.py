"""What is wrong with a machine, a storage and its studies."""
