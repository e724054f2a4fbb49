"""Layers, backbones and heads. Nothing here mentions a rank: `parallelize` spreads a model."""
