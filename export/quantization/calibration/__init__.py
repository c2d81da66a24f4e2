"""Ranges of activations from calibration images: observers, histograms, and a cache to resume from."""

__all__: list[str] = []
