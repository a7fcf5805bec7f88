"""Branch weights w_k: the spaces they are searched in and how they are applied."""
