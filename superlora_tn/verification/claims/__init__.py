"""What is claimed of a declaration: properties of every network, identities, reductions, counts."""
