"""What wins accuracy back from INT8: each algorithm in a module, switched on by a recipe."""

from __future__ import annotations

__all__: list[str] = []
