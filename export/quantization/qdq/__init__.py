"""Where QuantizeLinear and DequantizeLinear go, and the integers behind them."""

__all__: list[str] = []
