"""The model file: manifest, seal, ONNX schema, OpenVINO IR."""

__all__: list[str] = []
