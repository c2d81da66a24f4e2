"""Tests of export/deployment."""
