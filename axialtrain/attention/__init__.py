"""Attention along one axis of the image, its positions, and the config that describes it."""
