"""The one way a model file becomes a classifier or an encoder, for the command line, applications and tests alike.

Size limit, one read, seal, manifest, operator allow-list, target against this CPU, a trial in a sandbox unless this
machine has accepted the file before, the engine from those very bytes, what runs read back, golden check.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeAlias, cast, get_args

from vit_edge.errors import GoldenMismatch, ModelRejected, UsageError, escaped
from vit_edge.image import Decoding, Limits, Preprocessing
from vit_edge.machine.targets import mismatch, target_name
from vit_edge.model_file.artifact import ModelFile, open_model
from vit_edge.model_file.openvino_ir import IrModel, open_ir
from vit_edge.runtime.checks.acceptance import Trial, accept, is_known
from vit_edge.runtime.checks.golden import check_golden, check_images, promised, recorded_version
from vit_edge.runtime.checks.load_policy import LoadPolicy, Sandbox, current_policy, policy_with
from vit_edge.runtime.checks.operators import check_contents, check_sizes
from vit_edge.runtime.classifier import Classifier
from vit_edge.runtime.encoder import Encoder, as_encoder
from vit_edge.runtime.engines.devices import unavailable
from vit_edge.runtime.engines.protocol import (
    Engine,
    EngineName,
    EngineOptions,
    FloatPrecision,
    Model,
    available_devices,
    chosen_engines,
    engines_with,
    installed_engines,
    make_engine,
)
from vit_edge.runtime.loaded_model import LoadedModel
from vit_edge.runtime.onnx_import.importer import is_third_party, read_third_party
from vit_edge.runtime.tuned_configuration import promised_engines, tuned_configuration

__all__ = [
    "Verify",
    "admit",
    "check_decode",
    "load",
    "load_encoder",
    "load_model",
    "open_any",
    "run_checked",
]

Verify: TypeAlias = Literal["full", "hash", "none"]
_COMPUTES_NOTHING = "null"
_P = ParamSpec("_P")
_log = logging.getLogger(__name__)


def load(
    source: str | os.PathLike[str] | bytes | bytearray | memoryview,
    *,
    engine: EngineName | Literal["auto"] = "auto",
    device: str = "cpu",
    float_precision: FloatPrecision | None = None,
    threads: int | None = None,
    batch_size: int | None = None,
    decode: Decoding = "full",
    limits: Limits | None = None,
    verify: Verify = "full",
    sandbox: Sandbox | None = None,
    allow_ops: Sequence[str] | None = None,
    allow_fallback: bool = False,
    preprocessing: Preprocessing | Mapping[str, Any] | None = None,
    labels: Sequence[str] | None = None,
    require_signature: str | os.PathLike[str] | None = None,
) -> Classifier:
    """Return a classifier from a model file: ours (`.onnx`, or OpenVINO's `.xml` next to its `.bin`), or any ONNX one.

    The file of an encoder gives an `Encoder`; `load_encoder`, which takes the same options, has that type.

    - `engine` "auto" is what `vit-edge tune` found fastest for this file on this machine, else the first installed of
      ONNX Runtime and OpenVINO that has the device and that the file is promised for, the engines of its target first.
      Nothing is measured here.
    - `device` is "cpu", a provider of ONNX Runtime ("cuda", "tensorrt", "openvino", "coreml", "qnn", "directml",
      "xnnpack", "webgpu"), or a device of OpenVINO ("gpu", "npu", "auto"). One that is not here raises; with
      `allow_fallback` the CPU runs instead, the log warns, and `describe()` says why.
    - `float_precision` is that of the float part ("float32", "float16", "bfloat16"); None is float32 (NPU: float16).
    - `threads` None is what `vit-edge tune` found, else what the container grants.
    - `batch_size` gives the engine a static shape; other batches still run, in parts.
    - `decode` "fast" decodes large JPEGs at the smallest scale above the network's input.
    - `limits` are those of the images; the default is 50 megapixels, or $VIT_EDGE_MAX_IMAGE_MEGAPIXELS.
    - `verify` "full" checks seal, operators and golden vectors; "hash" leaves out the golden vectors unless the engine
      is another release than the file was checked in; "none" leaves out the seal too.
    - `sandbox` "auto" tries a file that this machine has not accepted before in a subprocess first, with limits on time
      and memory: a crash there leaves this process unharmed. A file that passed is known to later processes, for the
      same engine version, CPU and options. "always" tries every file, "never" none. The default is "auto".
    - `allow_ops` names operators that are allowed besides the operator allow-list; `describe()` lists them.
    - `preprocessing` (or its fields) and `labels` are for an ONNX classifier made elsewhere, and only for one.
    - `require_signature` is a public key: the file is loaded only if `vit-edge sign` signed it with the private one. It
      then counts as known: with `sandbox` "auto" it is not tried first.

    Raises ModelRejected, NotTrusted, GoldenMismatch, EngineUnavailable, MissingExtra or UsageError.

        >>> classifier = load("model.int8.onnx")
        >>> classifier
        <Classifier ..., int8, ... labels, ... on cpu, threads=...>
        >>> prediction = classifier("image.jpg")
        >>> prediction.label, prediction.probability
        ('...', 0...)
        >>> classifier.close()
    """
    options = EngineOptions(
        device=device,
        float_precision=float_precision,
        threads=threads,
        batch_size=batch_size,
        allow_fallback=allow_fallback,
    )
    _check_choice("verify", verify, get_args(Verify))
    policy = policy_with(sandbox, allow_ops, is_signed=bool(require_signature))
    check_decode(decode)
    model = open_any(
        source, preprocessing=preprocessing, labels=labels, verify=verify, require_signature=require_signature
    )
    loaded = load_model(
        model, engine=engine, options=options, verify=verify, decode=decode, limits=limits, policy=policy
    )
    return cast("Classifier", loaded)  # what nearly every file is: the types of applications stay simple


def _of_encoders(load_any: Callable[_P, object]) -> Callable[_P, Encoder]:
    """Return `load_any` with the type of what it gives for encoders, which is checked."""

    def load_encoder(*args: _P.args, **kwargs: _P.kwargs) -> Encoder:
        """Return an encoder from a model file, with the options of `load`; raises UsageError if it is a classifier."""
        source = args[0] if args else kwargs.get("source")
        loaded = load_any(*args, **kwargs)
        assert isinstance(loaded, LoadedModel)
        return as_encoder(loaded, "the bytes given" if isinstance(source, bytes) else str(source))

    return load_encoder


load_encoder = _of_encoders(load)


def open_any(
    source: str | os.PathLike[str] | bytes | bytearray | memoryview,
    *,
    preprocessing: Preprocessing | Mapping[str, Any] | None = None,
    labels: Sequence[str] | None = None,
    verify: Verify = "full",
    require_signature: str | os.PathLike[str] | None = None,
) -> Model:
    """Return the verified bytes of a model file of either format, or of an ONNX classifier with what is told of it."""
    if isinstance(source, bytearray | memoryview):
        source = bytes(source)
    if not isinstance(source, str | os.PathLike | bytes):
        raise TypeError(f"source is {type(source).__name__}; give a path, or the bytes of a model file")
    if require_signature is None:
        return _opened(source, preprocessing, labels, verify)
    if isinstance(source, bytes):
        raise UsageError("cannot load", reason="bytes have no signature", remedy="give the path of the model file")
    from vit_edge.runtime.checks import signature

    digests = signature.verify_signature(source, key=require_signature)
    model = _opened(source, preprocessing, labels, verify)
    signature.check_is_signed(model, digests)
    return model


def _opened(
    source: str | os.PathLike[str] | bytes,
    preprocessing: Preprocessing | Mapping[str, Any] | None,
    labels: Sequence[str] | None,
    verify: Verify,
) -> Model:
    if not isinstance(source, bytes) and Path(source).suffix.lower() == ".xml":
        if preprocessing is not None or labels is not None:
            raise _told_twice(source)
        return open_ir(source)
    if preprocessing is None and labels is None:
        return open_model(source, check=verify != "none")
    if preprocessing is None or labels is None:
        missing = "labels" if labels is None else "preprocessing"
        reason = f"a third-party model needs both preprocessing and labels; {missing} is not given"
        raise UsageError("cannot load", reason=reason, remedy=f"give {missing} too")
    if not is_third_party(source):
        raise _told_twice(source)
    if isinstance(labels, str) or not all(isinstance(label, str) for label in labels):
        raise UsageError("cannot load", reason="labels are not a list of texts", remedy="give one for each class")
    if not isinstance(preprocessing, Preprocessing):
        try:
            preprocessing = Preprocessing.from_dict(dict(preprocessing))
        except (TypeError, ValueError) as error:
            remedy = "give resize, crop, interpolation, mean and std"
            raise UsageError("cannot use the preprocessing", reason=str(error), remedy=remedy) from error
    return read_third_party(source, preprocessing=preprocessing, labels=labels)


def load_model(
    model: Model,
    *,
    engine: str = "auto",
    options: EngineOptions,
    verify: Verify = "full",
    decode: Decoding = "full",
    limits: Limits | None = None,
    warn: bool = True,
    policy: LoadPolicy | None = None,
) -> LoadedModel:
    """Return the classifier or encoder of a model file that was opened already; raises as `load` does.

    With `warn` False nothing is logged about another CPU or missing golden vectors, for a file that was just made.
    """
    policy = policy or current_policy()
    check_contents(model, allow_ops=policy.allow_ops)
    name = target_name(model.manifest.quantization)
    difference = mismatch(name) if name else None
    if difference and warn:
        _log.warning("%s: %s", model.source, difference)
    engine, options = _chosen(model, engine, options)
    trial = Trial(model=model, sha256=model.sha256, engine=engine, options=options, verify=verify)
    try:
        _try_first(trial, policy.sandbox)
        loaded, verified = run_checked(model, engine=engine, options=options, verify=verify)
    except (GoldenMismatch, ModelRejected) as error:
        error.file = error.file or model.source
        if difference and isinstance(error, GoldenMismatch):
            error.remedy = difference  # not that somebody edited the file
        raise
    if warn and verify == "hash" and loaded.name not in (*promised(model.manifest), _COMPUTES_NOTHING):
        _log.warning("%s: the file has no golden vectors for %s", model.source, loaded.name)
    _log.info("%s runs in %s %s, %d threads", model.source, loaded.name, loaded.version, loaded.threads)
    checked = {"verified": verified, "allowed_operators": list(policy.allow_ops)}
    kind = Encoder if model.manifest.is_encoder else Classifier
    return kind(loaded, model.manifest, sha256=trial.sha256, decoding=decode, limits=limits, checked=checked)


def admit(model: Model, *, engines: Sequence[str], golden: bool = True) -> None:
    """Try a file in these engines as `load_model` does first: for work that runs its graph in other ways too.

    Nothing is loaded in this process. With `golden` False a file that gives other logits is admitted, to find out why.
    Raises ModelRejected or GoldenMismatch.
    """
    policy = current_policy()
    check_contents(model, allow_ops=policy.allow_ops)
    for engine in engines:
        verify: Verify = "full" if golden and engine in promised(model.manifest) else "hash"
        trial = Trial(model=model, sha256=model.sha256, engine=engine, options=EngineOptions(), verify=verify)
        try:
            _try_first(trial, policy.sandbox)
        except (GoldenMismatch, ModelRejected) as error:
            error.file = error.file or model.source
            raise


def _try_first(trial: Trial, sandbox: Sandbox) -> None:
    """Run the trial in a sandbox if the file is not known here, or if every file is to be tried."""
    if trial.engine not in installed_engines() or (sandbox == "auto" and is_known(trial)):
        return
    check_sizes(trial.model)
    if sandbox == "never":
        return
    from vit_edge.runtime.checks.sandbox import try_in_sandbox  # a known file does not pay for its imports

    try_in_sandbox(trial)
    accept(trial)


def run_checked(model: Model, *, engine: str, options: EngineOptions, verify: Verify) -> tuple[Engine, str]:
    """Return the engine that runs the model in this process, after the golden check, and what was checked."""
    loaded = make_engine(engine, model, options)
    return loaded, _checked(model, loaded, verify)


def _chosen(model: Model, engine: str, options: EngineOptions) -> tuple[str, EngineOptions]:
    """Return the engine, and the options with the threads that `vit-edge tune` saved for this file."""
    if engine != "auto":
        return engine, options
    if isinstance(model, IrModel):
        return "openvino", options
    if not installed_engines():
        chosen_engines()  # raises what to install
    if options.device == "cpu" and options.float_precision is None and options.batch_size is None:
        configuration = tuned_configuration(model)
        if configuration is not None:
            return configuration.apply(options)
    able = engines_with(options.device)
    if not able and not options.allow_fallback:
        here = [f"{name} ({', '.join(engines)})" for name, engines in available_devices().items()]
        raise unavailable(options.device, ", ".join(here))
    candidates = able or chosen_engines()
    return next((name for name in promised_engines(model) if name in candidates), candidates[0]), options


def _is_unchecked(model: Model) -> bool:
    return isinstance(model, ModelFile) and model.is_third_party


def _checked(model: Model, engine: Engine, verify: Verify) -> str:
    """Check what is to be checked; returns what was: "full", "hash", "probe" or "none"."""
    manifest = model.manifest
    if engine.name == _COMPUTES_NOTHING or verify == "none":
        return "none" if verify == "none" else "hash"
    if _is_unchecked(model):
        return "probe"
    recorded = recorded_version(engine, manifest)
    is_other_release = recorded not in (None, engine.version)
    if is_other_release:
        _log.warning("%s was checked in %s %s, this is %s: its golden vectors are run",
                     model.source, engine.name, escaped(str(recorded)), engine.version)  # fmt: skip
    if verify == "hash" and not is_other_release:
        return "hash"
    if manifest.golden is None:
        remedy = "export it again, or load it with verify='hash'"
        raise ModelRejected(
            "cannot check the model", file=model.source, reason="the file has no golden vectors", remedy=remedy
        )
    check_images(manifest.golden, manifest.preprocessing)
    check_golden(engine, manifest)
    return "full"


def check_decode(decode: object) -> None:
    """Raise UsageError where there is no such way to decode."""
    _check_choice("decode", decode, ("full", "fast"))


def _check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UsageError("cannot load", reason=f"{name} is {value!r}", remedy=f"choose {', '.join(choices)}")


def _told_twice(source: str | os.PathLike[str] | bytes) -> UsageError:
    file = None if isinstance(source, bytes) else source
    reason = "the file is a model file of vit-edge, which holds preprocessing and labels"
    return UsageError("cannot load", file=file, reason=reason, remedy="leave preprocessing and labels out")
