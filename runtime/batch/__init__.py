"""Many images on many machines: jobs of Ray that write Parquet shards."""

__all__: list[str] = []
