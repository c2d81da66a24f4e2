"""Which model files this machine has accepted before; what a file says of itself does not count.

A file is known if this user loaded it here before with the same engine version, CPU and options, every check included.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import vit_edge
from vit_edge.cache import recall, remember
from vit_edge.files import sha256_hex
from vit_edge.machine.cpu import cpu_name, instruction_set
from vit_edge.model_file.artifact import ModelFile
from vit_edge.runtime.engines.protocol import EngineOptions, Model, engine_version

__all__ = ["Trial", "accept", "accept_own", "is_known", "refusal", "refuse"]

# A check that was passed covers those that ask for less.
_COVERED_BY = {"full": ("full",), "hash": ("hash", "full"), "none": ("none", "hash", "full")}
_accepted_here: set[str] = set()


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """A model file, how an engine is to run it, and what is checked."""

    model: Model
    sha256: str
    engine: str
    options: EngineOptions
    verify: str

    def key(self, verify: str | None = None) -> str:
        """Return a name for the trial: everything that may change its result."""
        chosen = self.options
        cpu = [cpu_name(), instruction_set()]
        kind = [type(self.model).__name__, getattr(self.model, "is_third_party", False)]
        file = [*kind, self.sha256, self._unchecked_weights()]
        how = [chosen.device, chosen.float_precision, chosen.batch_size, verify or self.verify]
        versions = [vit_edge.__version__, self.engine, _version(self.engine)]
        return sha256_hex(json.dumps([*file, *versions, *cpu, *how]).encode())

    def _unchecked_weights(self) -> str | None:
        """Return the hash of weights next to the model file if the manifest's hash of them was not checked."""
        weights = self.model.weights if isinstance(self.model, ModelFile) and self.verify == "none" else None
        return None if weights is None else sha256_hex(weights)


def _version(engine: str) -> str:
    try:
        return engine_version(engine)
    except Exception:  # a broken installation: the sandbox says what is wrong with it
        return "unknown"


def is_known(trial: Trial) -> bool:
    """Return whether this machine has accepted the file before, by these checks or stricter ones."""
    keys = [trial.key(verify) for verify in _COVERED_BY[trial.verify]]
    if any(key in _accepted_here for key in keys):
        return True
    return any((recall("accepted", key) or {}).get("accepted") is True for key in keys)


def accept(trial: Trial) -> None:
    """Remember that the file passed every check here; if nothing can be written, the next process tries it again."""
    key = trial.key()
    if key not in _accepted_here:
        _accepted_here.add(key)
        remember("accepted", key, {"accepted": True})


def accept_own(model: Model, *, engine: str) -> None:
    """Remember a file that this process made, and has loaded with every check."""
    accept(Trial(model=model, sha256=model.sha256, engine=engine, options=EngineOptions(), verify="full"))


def refuse(trial: Trial, reason: str) -> None:
    """Remember that the file crashed the engine."""
    remember("refused", trial.key(), {"reason": reason})


def refusal(trial: Trial) -> str | None:
    """Return why the file was refused before; None if it was not."""
    found = recall("refused", trial.key())
    return str(found["reason"]) if found and "reason" in found else None
