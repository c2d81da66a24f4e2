"""Tests of runtime/serving."""
