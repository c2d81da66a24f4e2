"""`vit-edge benchmark`: its measurements as tables, CSV, plots and comparisons."""

__all__: list[str] = []
