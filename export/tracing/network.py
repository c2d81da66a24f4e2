"""An image classifier to export, from a checkpoint or a module, and the form of it that is traced."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from vit_edge.checkpoint import Checkpoint
from vit_edge.errors import CheckpointRejected, UsageError
from vit_edge.export.sources.torch_network import TorchNetwork, unit_length
from vit_edge.export.tracing.fused_vit import DeployedViT, Embedding
from vit_edge.export.tracing.head import logits_of
from vit_edge.export.tracing.options import ExportOptions
from vit_edge.image import Pixels, Preprocessing
from vit_edge.model_file.artifact import warn_of_assumed
from vit_edge.model_file.tasks import Activation, Task, binary_labels, settled_task
from vit_edge.runtime.engines.protocol import Array, Logits
from vit_edge.runtime.onnx_import.head import are_probabilities, one_value, settled_activation
from vit_edge.tensor_file import tensor_digest
from vit_edge.vit import VisionTransformer

__all__ = [
    "EXTRAS",
    "Network",
    "PlainNetwork",
    "exact_logits",
    "from_checkpoint",
    "from_module",
    "from_torch_network",
    "reference_extras",
    "reference_logits",
    "reference_model",
    "traced_form",
]

# Outputs that come from inside the network; the others are computed from its logits.
EXTRAS = ("features", "attention", "tokens")
_NUM_NAMED = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """A classifier to export and its metadata; `model` maps normalised float32 NCHW images to logits.

    With `ends_in_activation` the model applies `final_activation` itself; the exported graph and the reference leave it
    out. A "binary" model gives one logit, and has two labels.
    """

    name: str
    model: nn.Module
    preprocessing: Preprocessing
    labels: tuple[str, ...]
    architecture: Mapping[str, Any]
    activation: Activation = "softmax"
    task: Task = "classification"
    ends_in_activation: bool = False
    license: str | None = None
    base_model: str | None = None
    evaluation: Mapping[str, Any] | None = None
    assumed: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def final_activation(self) -> Activation:
        """Return the activation of the model itself: a file of two logits has the softmax of them."""
        return "sigmoid" if self.task == "binary" else self.activation

    def with_labels(self, labels: Sequence[str] | None) -> Network:
        """Return the network with other labels; raises UsageError if their number is not that of the classes."""
        if labels is None:
            return self
        labels = binary_labels(labels) if self.task == "binary" else labels
        if len(labels) != len(self.labels):
            reason = f"{len(labels)} labels for {len(self.labels)} classes"
            raise UsageError("cannot export", reason=reason, remedy="give one label for each class, in their order")
        assumed = tuple(name for name in self.assumed if name != "labels")
        return replace(self, labels=tuple(labels), assumed=assumed)


def from_checkpoint(checkpoint: Checkpoint) -> Network:
    """Return the network of a checkpoint."""
    return Network(
        name=checkpoint.name,
        model=checkpoint.model,
        preprocessing=checkpoint.preprocessing,
        labels=checkpoint.labels,
        architecture=_architecture(checkpoint.model),
        license=checkpoint.license,
        base_model=checkpoint.base_model,
        evaluation=checkpoint.evaluation,
        assumed=checkpoint.assumed,
        provenance={"checkpoint_sha256": checkpoint.sha256},
    )


def from_module(
    module: nn.Module,
    *,
    preprocessing: Preprocessing | None,
    labels: Sequence[str] | None,
    activation: Activation | None = None,
    task: Task | None = None,
    name: str | None = None,
    assumed: Sequence[str] = (),
) -> Network:
    """Return the network of any torch classifier, put into evaluation mode; its forward is run once.

    `task` None is what the activation and the number of values say: the sigmoid of several is multi-label, that of one
    is binary, and "none" is regression. Without preprocessing, 224 pixels and ImageNet's mean and standard deviation
    are assumed, without labels the numbers of the classes; the file marks both as assumed. A softmax or sigmoid that
    ends the module is found and left out. Raises UsageError if `module` gives no logits, CheckpointRejected if a weight
    is not float32 or not finite.
    """
    module.eval()
    name = name or type(module).__name__
    assumed = list(assumed)
    if preprocessing is None:
        preprocessing = Preprocessing(resize=256, crop=(224, 224))
        assumed = ["preprocessing", *assumed]
    _check_float32(module, name)
    broken = [key for key, value in module.state_dict().items() if value.is_floating_point() and not _finite(value)]
    if broken:
        reason = f"not every weight is finite: {', '.join(broken[:_NUM_NAMED])}"
        raise CheckpointRejected("cannot export", file=name, reason=reason, remedy="train it again")
    original = module
    module, num_values, found = _classes(original, preprocessing, name)
    settled = _settled(activation, found, name)
    task = task or settled_task(activation, found, num_values)
    if task is None:
        raise one_value(name, what="cannot export")
    num_labels = 2 if task == "binary" else num_values
    if labels is None:
        labels, assumed = [str(number) for number in range(num_labels)], [*assumed, "labels"]
    warn_of_assumed(assumed, name)
    network = Network(
        name=name,
        model=module,
        preprocessing=preprocessing,
        labels=tuple(str(number) for number in range(num_labels)),
        architecture=_architecture(original),
        activation="softmax" if task == "binary" else settled,
        task=task,
        ends_in_activation=found in ("softmax", "sigmoid"),
        assumed=tuple(assumed),
        provenance={"weights_sha256": tensor_digest({}, original.state_dict())},
    )
    return replace(network.with_labels(labels), assumed=tuple(assumed))


def from_torch_network(opened: TorchNetwork) -> Network:
    """Return the network of another library or of the user's own code; raises as `from_module` does."""
    network = from_module(
        opened.module,
        preprocessing=opened.preprocessing,
        labels=opened.labels,
        activation=opened.activation,
        task=opened.task,
        name=opened.name,
        assumed=opened.assumed,
    )
    return replace(
        network,
        license=opened.license,
        base_model=opened.base_model,
        architecture={**network.architecture, **opened.source},
    )


def _architecture(module: nn.Module) -> dict[str, Any]:
    if isinstance(module, VisionTransformer):
        return {"family": "vit", **module.config.to_dict()}
    return {"family": "torch", "class": type(module).__name__}


def traced_form(network: Network, options: ExportOptions) -> nn.Module:
    """Return the module to trace: the fused inference graph of a Vision Transformer, else the network as it is."""
    extras = [name for name in EXTRAS if name in options.outputs]
    pixels = options.input == "uint8-nhwc"
    if isinstance(network.model, VisionTransformer) and options.fuse:
        with torch.no_grad():
            return DeployedViT(
                network.model, network.preprocessing, pixels=pixels, extras=extras, embedding=_embedding(options)
            ).eval()
    if extras:
        reason = f"{' and '.join(extras)} come with the fused inference graph of a Vision Transformer only"
        raise UsageError("cannot export", file=network.name, reason=reason, remedy="leave them out of --outputs")
    return PlainNetwork(reference_model(network, options), network.preprocessing, pixels=pixels).eval()


def reference_model(network: Network, options: ExportOptions) -> nn.Module:
    """Return the module that gives the first output: the network itself, or that of its embedding."""
    if not options.is_encoder:
        return network.model
    return EmbeddingNetwork(network.model, is_normalized=options.normalize).eval()


def _embedding(options: ExportOptions) -> Embedding | None:
    if not options.is_encoder:
        return None
    return "normalized" if options.normalize else "plain"


class EmbeddingNetwork(nn.Module):
    """A Vision Transformer without its head, or any network that gives vectors; they have length 1 if asked for."""

    def __init__(self, model: nn.Module, *, is_normalized: bool) -> None:
        super().__init__()
        self.model, self.is_normalized = model, is_normalized

    def forward(self, images_NCHW: Tensor) -> Tensor:
        if isinstance(self.model, VisionTransformer):
            tokens_BTD = self.model.forward_features(images_NCHW)
            is_distilled = self.model.config.distilled
            vectors_BD: Tensor = tokens_BTD[:, :2].mean(dim=1) if is_distilled else self.model.pool(tokens_BTD)
        else:
            vectors_BD = self.model(images_NCHW)
        return unit_length(vectors_BD) if self.is_normalized else vectors_BD


class PlainNetwork(nn.Module):
    """Any network as it is; uint8 pixels [batch, height, width, 3] are normalised before it."""

    def __init__(self, network: nn.Module, preprocessing: Preprocessing, *, pixels: bool) -> None:
        super().__init__()
        self.network, self.pixels = network, pixels
        # (x/255 - mean)/std as one multiplication and one addition. Folded into a convolution it would not be exact:
        # padding is zero after normalisation, not before.
        mean_C11, std_C11 = (
            torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (preprocessing.mean, preprocessing.std)
        )
        self.register_buffer("pixels_scale", (1 / (255 * std_C11)).float())
        self.register_buffer("pixels_shift", (-mean_C11 / std_C11).float())

    def forward(self, images: Tensor) -> Tensor:
        if self.pixels:
            images = images.permute(0, 3, 1, 2).float()
            images = images * self.get_buffer("pixels_scale") + self.get_buffer("pixels_shift")
        logits_BK: Tensor = self.network(images)
        return logits_BK


def reference_logits(
    model: nn.Module, preprocessing: Preprocessing, *, ends_in_activation: bool = False
) -> Callable[[Pixels], Logits]:
    """Return PyTorch's float32 logits as a function of uint8 [batch, height, width, 3]."""

    def run(images_NHWC: Pixels) -> Logits:
        images_NCHW = torch.from_numpy(preprocessing.normalise(images_NHWC))
        with torch.inference_mode():
            found = logits_of(model, images_NCHW)[0] if ends_in_activation else model(images_NCHW)
            logits_BK: Logits = found.numpy()
        return logits_BK

    return run


def exact_logits(model: nn.Module, preprocessing: Preprocessing, images_NHWC: Pixels) -> npt.NDArray[np.float64] | None:
    """Return the logits in float64, None for networks that are not our own: they may ask for float32 inside."""
    own = model.model if isinstance(model, EmbeddingNetwork) else model
    if not isinstance(own, VisionTransformer):
        return None
    with torch.inference_mode():
        images_NCHW = torch.from_numpy(preprocessing.normalise(images_NHWC)).double()
        logits_BK: npt.NDArray[np.float64] = copy.deepcopy(model).double()(images_NCHW).numpy()
    return logits_BK


def reference_extras(model: VisionTransformer, preprocessing: Preprocessing) -> Callable[[Pixels], dict[str, Array]]:
    """Return PyTorch's extras, as `DeployedViT` names them, as a function of uint8 images."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, inputs: seen.update({name: inputs[0]})

    def run(images_NHWC: Pixels) -> dict[str, Array]:
        last = model.blocks[-1].get_submodule("attn")
        hooks = [model.head.register_forward_pre_hook(keep("head")), last.register_forward_pre_hook(keep("last"))]
        if model.config.distilled:
            hooks.append(model.head_dist.register_forward_pre_hook(keep("head_dist")))
        with torch.inference_mode():
            images_NCHW = torch.from_numpy(preprocessing.normalise(images_NHWC))
            model(images_NCHW)
            tokens = model.forward_features(images_NCHW)
            features = torch.cat([seen[name] for name in ("head", "head_dist") if name in seen], dim=1)
            attention = _attention_to_patches(model, seen["last"])
        for hook in hooks:
            hook.remove()
        return {"features": features.numpy(), "attention": attention.numpy(), "tokens": tokens.numpy()}

    return run


def _attention_to_patches(model: VisionTransformer, x_BTD: Tensor) -> Tensor:
    config = model.config
    weights_BNTT = model.blocks[-1].get_submodule("attn").weights(x_BTD)  # type: ignore[operator]
    prefix = config.num_prefix_tokens
    asking = weights_BNTT[:, :, prefix:] if config.pooling == "mean" else weights_BNTT[:, :, :1]
    attention: Tensor = asking[..., prefix:].mean(dim=2).reshape(-1, config.num_heads, *config.grid)
    return attention


class _Unwrapped(nn.Module):
    """A network that returns its logits among other outputs, as those of transformers do."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits_BK: Tensor = self.network(images)["logits"]
        return logits_BK


def _classes(module: nn.Module, preprocessing: Preprocessing, name: str) -> tuple[nn.Module, int, Activation | None]:
    """Return the module that gives the logits alone, how many classes it has, and the activation that ends it.

    Raises UsageError.
    """
    images = torch.from_numpy(preprocessing.normalise(np.zeros((2, *preprocessing.crop, 3), np.uint8)))
    try:
        with torch.inference_mode():
            values: object = module(images)
            if isinstance(values, Mapping) and isinstance(values.get("logits"), Tensor):
                module, values = _Unwrapped(module), values["logits"]
            _, found = logits_of(module, images)
    except Exception as error:  # any exception that a network raises
        raise _does_not_run(module, preprocessing, name, error) from error
    shape = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
    if not isinstance(values, Tensor) or values.ndim != 2 or len(values) != 2 or not values.is_floating_point():
        remedy = "export a module that returns one tensor of logits"
        reason = f"the network gives {shape}, not float32 [batch, classes]"
        raise UsageError("cannot export", file=name, reason=reason, remedy=remedy)
    if found is None and are_probabilities(values.numpy()):
        found = "none"
    return module, values.shape[1], found


def _does_not_run(module: nn.Module, preprocessing: Preprocessing, name: str, error: Exception) -> UsageError:
    height, width = preprocessing.crop
    text = " ".join(str(error).split())[:300]
    first = next((part for part in module.modules() if isinstance(part, nn.Conv2d)), None)
    channels = first.in_channels if first is not None else 3
    if channels in (1, 4):
        kind = "grayscale images (1 channel)" if channels == 1 else "images with 4 channels"
        reason, remedy = f"the network takes {kind}; vit-edge exports RGB networks", "make the network with 3 channels"
    else:
        reason = f"the network does not run on RGB images of {height} x {width}: {text}"
        remedy = "give the size of the network with --image-size"
    return UsageError("cannot export", file=name, reason=reason, remedy=remedy)


def _settled(declared: Activation | None, found: Activation | None, name: str) -> Activation:
    try:
        return settled_activation(declared, found)
    except UsageError as error:
        error.what, error.file = "cannot export", name
        raise


def _check_float32(module: nn.Module, name: str) -> None:
    for key, value in module.state_dict().items():
        if value.is_floating_point() and value.dtype != torch.float32:
            kind = str(value.dtype).removeprefix("torch.")
            reason = f"the weight {key} is {kind}; export starts from float32"
            raise CheckpointRejected("cannot export", file=name, reason=reason, remedy="call .float() on the network")


def _finite(value: Tensor) -> bool:
    return bool(torch.isfinite(value).all())
