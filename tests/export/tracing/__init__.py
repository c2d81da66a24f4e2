"""Tests of export/tracing."""
