"""Run a model file on a device: numpy, Pillow, protobuf and one inference engine, no torch.

from vit_edge.runtime import load

with load("model.int8.onnx") as classifier:
    print(classifier("image.jpg").label)
"""

from vit_edge.image import Limits
from vit_edge.runtime.benchmark.results import Benchmark, BenchmarkOptions, Measurement
from vit_edge.runtime.benchmark.runner import measure
from vit_edge.runtime.benchmark.scenarios import Scenario
from vit_edge.runtime.benchmark.statistics import Latency
from vit_edge.runtime.classifier import Answer, Classifier, Prediction, Timings
from vit_edge.runtime.encoder import Encoder
from vit_edge.runtime.engines.protocol import EngineName, installed_engines
from vit_edge.runtime.loading import load, load_encoder
from vit_edge.runtime.serving.pool import Pool

__all__ = [
    "Answer",
    "Benchmark",
    "BenchmarkOptions",
    "Classifier",
    "Encoder",
    "EngineName",
    "Latency",
    "Limits",
    "Measurement",
    "Pool",
    "Prediction",
    "Scenario",
    "Timings",
    "installed_engines",
    "load",
    "load_encoder",
    "measure",
]
