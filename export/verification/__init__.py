"""Is INT8 as accurate as float32? `verify` bounds the loss with 95 % confidence."""

__all__: list[str] = []
