"""Third-party weights: files, names, shapes, settings, hubs, preprocessing search; the entry is `vit_edge.convert`."""

__all__: list[str] = []
