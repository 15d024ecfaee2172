"""The paper's experiments by name: ``superlora-tn reproduce classification | diffusion | geometry``."""

__version__ = "0.1.0"
