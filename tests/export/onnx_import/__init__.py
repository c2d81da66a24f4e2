"""Tests of export/onnx_import."""
