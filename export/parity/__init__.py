"""Proof that a file is the network: engines against PyTorch, golden vectors, the first tensor that differs."""

__all__: list[str] = []
