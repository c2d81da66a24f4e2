"""Measure models on this machine: `measure`, scenarios, statistics, and `tune`."""

__all__: list[str] = []
