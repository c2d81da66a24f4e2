"""Seeded mutants, kills at random moments, and the parsers."""
