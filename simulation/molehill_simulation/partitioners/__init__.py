"""How rows are dealt to clients (axis ``partitioner``): ``(params, rows, clients, seed) -> list[Shard]``.

Every partitioner gives each row to exactly one client and keeps `units` together; equal arguments give equal shards.
"""

WORDS = ("split", "partition", "sharding")
