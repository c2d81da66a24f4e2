"""Networks to export, from any source: checkpoints, libraries, exported programs and code that Python can import."""

__all__: list[str] = []
