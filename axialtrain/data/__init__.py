"""Images of any size as shards, and each rank's own part of them.

scene -> readers -> shard -> (store: the format) -> region -> loader. Knows `axialtrain.grid` only,
and has no collective: what the ranks must agree on, they agree on in the training loop.
"""
