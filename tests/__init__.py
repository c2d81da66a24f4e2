"""Tests: the public interface, real engines, real files."""
