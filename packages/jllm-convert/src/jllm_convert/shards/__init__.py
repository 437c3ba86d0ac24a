"""Conversion of a model on the hub shard by shard: each is fetched, used and deleted."""
