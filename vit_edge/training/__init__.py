"""The parts of training; `vit_edge.train` is the way in."""

__all__: list[str] = []
