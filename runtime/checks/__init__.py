"""What a file must pass before it runs: operator allow-list, sandbox, golden vectors."""

__all__: list[str] = []
