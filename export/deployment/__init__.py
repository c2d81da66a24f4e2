"""From a checkpoint to verified files in one command, with a record: `deploy`."""

__all__: list[str] = []
