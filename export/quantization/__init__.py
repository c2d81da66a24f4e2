"""From a float32 model file to an INT8 one: `quantize`."""

__all__: list[str] = []
