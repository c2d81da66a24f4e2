"""vit-edge: take a Vision Transformer from a checkpoint to the device, and prove that nothing was lost."""

__version__ = "0.1.0"
__all__ = ["__version__"]
