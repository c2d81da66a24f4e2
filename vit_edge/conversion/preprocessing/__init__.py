"""How a network expects its images: read from settings, or inferred from labelled images."""

__all__: list[str] = []
