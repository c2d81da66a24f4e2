"""Tests of export/parity."""
