"""Where an INT8 error comes from, stage by stage and layer by layer: `explain`."""

__all__: list[str] = []
