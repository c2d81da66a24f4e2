"""Tests of data: folders, labels, copies."""
