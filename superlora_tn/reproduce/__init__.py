"""The paper's experiments by name: ``superlora-tn reproduce classification | diffusion | geometry``."""
