"""What a deployment claims, each with a verdict: that INT8 is as accurate as float32, and that it is faster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vit_edge.export.quantization.speed import ratio_of_rounds
from vit_edge.export.verification.verdict import SEVERITY, Verdict
from vit_edge.machine.cpu import cpu_name

__all__ = ["Claim", "accuracy_claim", "device_claim", "speed_claim", "worst_verdict"]

# Exit codes of errors that speak against the files themselves: not trusted, other logits than promised.
_AGAINST_THE_FILES = (4, 6)
_MORE_QUIET = "run again on a quiet machine, or add --no-speed to decide on accuracy alone"


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """One claim: what it is about, its verdict, the figures in words, and what to do unless it passes."""

    subject: str
    verdict: Verdict
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.subject}: {self.verdict}, {self.text}"


def worst_verdict(claims: Sequence[Claim]) -> Verdict:
    """Return the verdict of the whole: a deployment passes if all of its claims do."""
    return max((claim.verdict for claim in claims), key=SEVERITY.__getitem__)


def accuracy_claim(verification: Mapping[str, Any]) -> Claim:
    """Return the claim about accuracy from what a record keeps of a verification."""
    verdict: Verdict = verification["verdict"]
    worst = max(
        verification["engines"], key=lambda e: (SEVERITY[e["verdict"]], e["drop_upper_bound_points"], e["num_changed"])
    )
    at_most = "at most " if worst["unlabelled"] else ""
    needed = worst.get("images_needed")
    images = f"about {needed:,} evaluation images" if needed else "more evaluation images"
    remedies: dict[Verdict, str] = {
        "pass": "",
        "inconclusive": f"give {images} with --data, or a larger --max-drop",
        "fail": "add --recipe accurate, or see where the error comes from with `vit-edge explain`",
    }
    return Claim(
        subject="accuracy",
        verdict=verdict,
        text=f"on {worst['images']} images INT8 loses {at_most}{worst['drop_points']:.2f} points, no more than "
        f"{worst['drop_upper_bound_points']:.2f} with 95 % confidence; {worst['agreement']:.2f} % of the predictions "
        f"are the same (worst engine: {worst['engine']})",
        remedy=remedies[verdict],
    )


def speed_claim(engines: Sequence[Mapping[str, Any]], noise: Sequence[str]) -> Claim:
    """Return the claim about speed here, in the most favourable engine; `noise` names what disturbed."""
    best = min(engines, key=lambda each: (SEVERITY[_faster(each["ratio_interval"])], -each["ratio_interval"][0]))
    about = f"batch 1, one thread, {cpu_name()}"
    return _speed("speed", best["ratio"], best["ratio_interval"], best["engine"], about, noise)


def device_claim(device: Mapping[str, Any]) -> Claim:
    """Return the claim about speed on a device, from its `results` of `vit-edge benchmark --json` or its `error`."""
    subject = f"speed on {device['device']}{' (emulated)' if device.get('emulated') else ''}"
    by_engine: dict[str, dict[str, Any]] = {}
    for entry in device["results"]:
        by_engine.setdefault(entry["engine"], {})[entry["precision"].removesuffix("-dynamic")] = entry
    pairs = [both for both in by_engine.values() if both.keys() >= {"float32", "int8"}]
    if not pairs:
        against = device.get("error_exit_code") in _AGAINST_THE_FILES
        text = f"nothing was measured: {device.get('error', 'no engine ran both files')}"
        remedy = "connect the device and run again"
        return Claim(subject=subject, verdict="fail" if against else "inconclusive", text=text, remedy=remedy)
    found = [(ratio_of_rounds(b["float32"]["by_round_ms"], b["int8"]["by_round_ms"]), b["int8"]) for b in pairs]
    ratio, entry = min(found, key=lambda each: (SEVERITY[_faster(each[0].interval)], -each[0].interval[0]))
    engine = f"{entry['engine']} {entry['engine_version']}"
    about = f"batch 1, one thread, {entry['cpu']} ({entry['instruction_set']}); golden vectors pass"
    return _speed(subject, ratio.by_round, ratio.interval, engine, about, device.get("noise", ()))


def _speed(
    subject: str, ratio: float, interval: Sequence[float], engine: str, about: str, noise: Sequence[str]
) -> Claim:
    verdict = _faster(interval)
    low, high = interval
    text = f"{ratio:.2f} times as fast as float32 in {engine} ({low:.2f} to {high:.2f} with 95 % confidence; {about})"
    if verdict == "inconclusive":
        text += f"; noise: {', '.join(noise) or 'none found, the difference is too small to measure'}"
    remedies: dict[Verdict, str] = {
        "pass": "",
        "inconclusive": _MORE_QUIET,
        "fail": "choose the --target of this machine, deploy the float32 file, or add --no-speed",
    }
    return Claim(subject=subject, verdict=verdict, text=text, remedy=remedies[verdict])


def _faster(interval: Sequence[float]) -> Verdict:
    """Return `pass` if the whole interval is above 1, `fail` if it is below, else `inconclusive`."""
    low, high = interval
    return "pass" if low > 1 else "fail" if high < 1 else "inconclusive"
