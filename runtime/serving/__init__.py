"""Many callers on one model: `Pool`, its queue, and model versions that change under load."""

__all__: list[str] = []
