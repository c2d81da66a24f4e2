"""Tests of runtime/onnx_import."""
