"""How careful loads are: when the sandbox is used, and which operators the user allows besides the allow-list."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, get_args

from vit_edge.errors import UsageError

__all__ = ["NO_SANDBOX", "LoadPolicy", "Sandbox", "current_policy", "load_policy", "policy_with", "without_sandbox"]

Sandbox: TypeAlias = Literal["auto", "always", "never"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadPolicy:
    """When the sandbox is used, and the operators that are allowed besides; raises UsageError on what cannot be."""

    sandbox: Sandbox = "auto"
    allow_ops: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.sandbox not in get_args(Sandbox):
            choices = ", ".join(get_args(Sandbox))
            raise UsageError("cannot load", reason=f"sandbox is {self.sandbox!r}", remedy=f"choose {choices}")
        if not all(isinstance(name, str) and name for name in self.allow_ops):
            reason = f"allow_ops is {self.allow_ops!r}"
            raise UsageError("cannot load", reason=reason, remedy='give names of operators, such as ["GridSample"]')


# For what came with the code that runs.
NO_SANDBOX = LoadPolicy(sandbox="never")
_policy: ContextVar[LoadPolicy | None] = ContextVar("vit_edge_load_policy", default=None)


def current_policy() -> LoadPolicy:
    """Return the policy of the command that runs, else the default."""
    return _policy.get() or LoadPolicy()


def without_sandbox() -> LoadPolicy:
    """Return the current policy for files that this process made, or has tried already."""
    return replace(current_policy(), sandbox="never")


def policy_with(sandbox: Sandbox | None, allow_ops: Sequence[str] | None, *, is_signed: bool = False) -> LoadPolicy:
    """Return the current policy with what a caller gives; a file whose signature is required counts as known."""
    current = current_policy()
    chosen = current.allow_ops if allow_ops is None else tuple(allow_ops)
    policy = LoadPolicy(sandbox=sandbox or current.sandbox, allow_ops=chosen)
    return replace(policy, sandbox="never") if is_signed and policy.sandbox == "auto" else policy


@contextmanager
def load_policy(policy: LoadPolicy) -> Iterator[None]:
    """Hold the policy for every load of the block that gives none."""
    token = _policy.set(policy)
    try:
        yield
    finally:
        _policy.reset(token)
