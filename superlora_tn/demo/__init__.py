"""The embedded demo's task: a ViT pre-trained on printed digits, then adapted to scanned handwriting."""
