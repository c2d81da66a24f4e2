"""Tests of export/explanation."""
