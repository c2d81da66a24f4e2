"""From a checkpoint to an ONNX model file: `export_onnx`."""

__all__: list[str] = []
