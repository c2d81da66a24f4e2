"""Weights from elsewhere: files, names, shapes, settings, hubs, the detective; `vit_edge.convert` is the way in."""

__all__: list[str] = []
