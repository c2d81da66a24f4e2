"""Tools for ONNX graphs that decide nothing: editing, shapes and costs, float16, preparation of a graph."""

__all__: list[str] = []
