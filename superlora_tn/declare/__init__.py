"""Declarations: parts of a network, folds, fixed maps; frozen values and their plain-data form. No torch."""
