"""How a model carries adapters: kinds of layers, targets, the handle. The only code that alters a model."""
