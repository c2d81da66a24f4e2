"""Tests of runtime/benchmark."""
