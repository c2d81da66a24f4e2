"""Shared by the scripts: timing, results, other tools' quantizers."""
