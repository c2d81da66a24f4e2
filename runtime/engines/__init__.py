"""One protocol over ONNX Runtime and OpenVINO, and the null engine that measures the harness."""

__all__: list[str] = []
