"""The device mesh, how tokens move between layouts, and tensor parallelism."""
