"""A declaration with sizes: one graph; the spec, its presets, and counts to settings. No torch."""
