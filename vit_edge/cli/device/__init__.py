"""Commands that run on a device: classify, embed, inspect, doctor, tune, seal, sign, bundle, repository."""

__all__: list[str] = []
