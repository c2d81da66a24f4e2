"""What each algorithm did and what it left alone, as a sentence: an algorithm must not do nothing in silence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from vit_edge.errors import UsageError
from vit_edge.export.quantization.algorithms.recipes import Algorithm

__all__ = ["Account", "account_of", "refuse_idle"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Account:
    """How many of the `found` parts of a graph an algorithm changed, and why it left the others, by reason."""

    algorithm: Algorithm
    done: int
    found: int
    what: str
    left: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return a sentence such as "repq 5 of 15 norms: 10 feed a Transpose"."""
        reasons = ", ".join(f"{number} {reason}" for reason, number in self.left.items())
        return f"{self.algorithm} {self.done} of {self.found} {self.what}" + (f": {reasons}" if reasons else "")


def account_of(algorithm: Algorithm, what: str, *, done: int, left: Iterable[str]) -> Account:
    """Return the account of an algorithm that changed `done` parts and left one for each reason in `left`."""
    reasons = dict(Counter(left).most_common())
    return Account(algorithm=algorithm, done=done, found=done + sum(reasons.values()), what=what, left=reasons)


def refuse_idle(accounts: Sequence[Account], named: Sequence[str]) -> None:
    """Raise UsageError if an algorithm that the user named found nothing to do."""
    for account in accounts:
        if account.algorithm in named and not account.done:
            remedy = f"leave --algorithm {account.algorithm} out"
            raise UsageError("cannot quantize", reason=f"an algorithm found nothing to do: {account}", remedy=remedy)
