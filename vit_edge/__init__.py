"""vit-edge: take a Vision Transformer from a checkpoint to the device, and prove that nothing was lost."""

import logging

from vit_edge.machine.openmp import rest_idle_threads
from vit_edge.machine.telemetry import disable_telemetry

__version__ = "0.1.0"
__all__ = ["__version__"]

# An application that set up no logging sees nothing of ours on its stderr.
logging.getLogger(__name__).addHandler(logging.NullHandler())

# Before anything imports torch or ONNX Runtime: they read these settings once.
rest_idle_threads()
disable_telemetry()
