"""Commands that need a workstation: train, convert, export, quantize, verify, explain, deploy, report."""

__all__: list[str] = []
