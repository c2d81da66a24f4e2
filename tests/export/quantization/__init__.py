"""Tests of export/quantization."""
