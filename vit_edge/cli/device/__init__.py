"""Commands that run on a device: classify, benchmark, inspect, doctor, tune, seal, bundle."""

__all__: list[str] = []
