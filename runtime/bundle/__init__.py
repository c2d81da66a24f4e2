"""One-file applications: `bundle`."""

__all__: list[str] = []
