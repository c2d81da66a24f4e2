"""From a third-party ONNX model to a model file of vit-edge: `import_onnx`."""

__all__: list[str] = []
