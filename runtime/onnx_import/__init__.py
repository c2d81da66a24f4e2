"""Load third-party ONNX models: their layout, weights files and outputs."""

__all__: list[str] = []
