"""What hardware can do: CPU, targets, ONNX Runtime releases, `doctor`."""

__all__: list[str] = []
