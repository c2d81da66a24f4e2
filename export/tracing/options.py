"""The options of an export: the form of the file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from vit_edge.errors import UsageError
from vit_edge.machine.releases import highest_versions

__all__ = ["OUTPUT_CHOICES", "ExportOptions", "Format", "Input", "Output"]

Input: TypeAlias = Literal["uint8-nhwc", "float32-nchw"]
Output: TypeAlias = Literal["logits", "probabilities", "top5", "features", "attention", "embedding", "tokens"]
Format: TypeAlias = Literal["onnx", "openvino", "huggingface"]
OUTPUT_CHOICES: tuple[Output, ...] = get_args(Output)
_CHOICES: dict[str, tuple[str, ...]] = {
    "input": get_args(Input),
    "format": get_args(Format),
}
_MOST_BATCH = 1024
_OF_ENCODERS: tuple[Output, ...] = ("embedding", "tokens", "attention")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportOptions:
    """The form of the exported file; raises UsageError if it is not possible.

    `batch_size` None keeps the batch dynamic. `outputs` always begin with the logits, which golden vectors and the
    runtime read. With "embedding" among them the file is that of an encoder, without the head: the vector comes first,
    then "tokens" and "attention"; `normalize` gives the vector length 1. With `fuse` a Vision Transformer is traced as
    its fused inference graph. `min_onnxruntime` is the oldest ONNX Runtime that must be able to run the file.
    """

    batch_size: int | None = None
    input: Input = "uint8-nhwc"
    outputs: tuple[Output, ...] = ("logits",)
    min_onnxruntime: str = "1.17"
    format: Format = "onnx"
    fuse: bool = True
    normalize: bool = False

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise _wrong(f"{name} is {getattr(self, name)!r}", f"choose {' or '.join(choices)}")
        if self.batch_size is not None and not 1 <= self.batch_size <= _MOST_BATCH:
            raise _wrong(f"batch_size is {self.batch_size}", f"give 1 to {_MOST_BATCH:,}, or leave it dynamic")
        given = self.outputs
        unknown = [name for name in given if name not in OUTPUT_CHOICES]
        if unknown:
            raise _wrong(f"no output is named {unknown[0]!r}", f"choose from {', '.join(OUTPUT_CHOICES)}")
        # One order: the same choice gives the same bytes.
        choices, first = (_OF_ENCODERS, "embedding") if self.is_encoder else (OUTPUT_CHOICES, "logits")
        chosen = tuple(name for name in choices if name == first or name in self.outputs)
        object.__setattr__(self, "outputs", chosen)
        self._check_encoder(given)
        try:
            highest_versions(self.min_onnxruntime)
        except ValueError as error:
            raise _wrong(str(error), "name a later release") from error
        self._check_format()

    def _check_encoder(self, given: tuple[Output, ...]) -> None:
        if self.normalize and not self.is_encoder:
            raise _wrong("normalize is for an embedding", "add --outputs embedding")
        if "tokens" in given and not self.is_encoder:
            raise _wrong("tokens are an output of an encoder", "give --outputs embedding,tokens")
        other = [name for name in given if self.is_encoder and name not in _OF_ENCODERS]
        if other:
            remedy = f"choose from {', '.join(_OF_ENCODERS)}, or export two files"
            raise _wrong(f"an encoder has no head, which {other[0]} needs", remedy)

    def _check_format(self) -> None:
        if self.format == "huggingface":
            if self.outputs != ("logits",):
                raise _wrong("a Hugging Face folder gives the logits only", "leave --outputs out")
            object.__setattr__(self, "input", "float32-nchw")  # its pixel_values

    @property
    def is_encoder(self) -> bool:
        """Return whether the file gives a vector for each image, not logits."""
        return "embedding" in self.outputs

    @property
    def output_names(self) -> tuple[str, ...]:
        """Return the names of the graph's outputs: the five likeliest are two tensors, classes and probabilities."""
        names = [(name, "top5_probabilities") if name == "top5" else (name,) for name in self.outputs]
        return tuple(name for group in names for name in group)


def _wrong(reason: str, remedy: str) -> UsageError:
    return UsageError("cannot export", reason=reason, remedy=remedy)
