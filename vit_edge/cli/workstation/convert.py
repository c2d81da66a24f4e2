"""`vit-edge convert`."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vit_edge.cli.options import option_group
from vit_edge.cli.output import Result, command, file_argument, image_size_option, make_table, megabytes, progress_bar
from vit_edge.errors import printable, require

if TYPE_CHECKING:
    from vit_edge.conversion.conversion import ConversionReport
    from vit_edge.conversion.preprocessing.search import Finding

_PATH = click.Path(path_type=Path)
_NUM_SHOWN = 12


@command("convert")
@file_argument("source")
@click.option("-o", "--out", type=_PATH, default=Path("checkpoint.safetensors"), show_default=True,
              help="Checkpoint to write.")  # fmt: skip
@click.option("--force", is_flag=True, help="Replace an existing file.")
@option_group(
    "What the weights do not specify",
    click.option("--like", metavar="timm:NAME", help="Take heads, activation, eps and preprocessing from timm."),
    click.option("--preprocessing", type=_PATH, metavar="FILE",
                 help="TOML or JSON: resize, crop, interpolation, mean, std."),
    click.option("--labels", type=_PATH, metavar="FILE|DIR",
                 help="Class names: a text file, a JSON file or class folders."),
    click.option("--data", type=_PATH, metavar="LABELLED", help="Infer unspecified settings from labelled images."),
)  # fmt: skip
@option_group(
    "Changes to the network",
    image_size_option("Resample the position embedding for another input size."),
    click.option("--num-classes", type=click.IntRange(1, 65_536), help="Replace the head by zeros for N classes."),
)
def convert(source: Path, out: Path, force: bool, **options: Any) -> Result:
    """Convert the weights in SOURCE to a checkpoint, exactly.

    SOURCE is a file (.safetensors, .pt, .pth, .bin, .npz), a folder of Hugging Face or timm, or timm:NAME, hf:REPO,
    torchvision:NAME. The network is recognised by the names and shapes of its tensors and by the config next to them.
    Anything that neither specifies comes from --like, --preprocessing and --labels. Otherwise it is assumed, and every
    later command warns about it; --data infers it from at most 64 labelled images.

    \b
    Examples:
      vit-edge convert model.safetensors --like timm:deit_tiny_patch16_224 \\
        --labels classes.txt
      vit-edge convert hf:google/vit-base-patch16-224 -o vit.safetensors
      vit-edge convert weights.pth --labels classes.txt --data images/
    """
    for module in ("torch", "safetensors"):
        require(module, extra="export", what="convert")
    from vit_edge.convert import convert as run

    with progress_bar() as progress:
        report = run(source, out=out, force=force, progress=progress, **options)
    return Result(data=_data(report), shown=_shown(report))


def _shown(report: ConversionReport) -> list[Any]:
    rows = [(name, f"from {source}") for name, source in report.known.items()]
    rows += [(name, f"inferred from {report.finding.num_images} images") for name in report.found if report.finding]
    rows += [(name, "assumed (not specified)") for name in report.assumed]
    title = f"{report.library}, {len(report.mapped)} tensors, {report.num_parameters:,} parameters"
    title += f", {len(report.missing)} missing, {len(report.unexpected)} unexpected"
    shown: list[Any] = [make_table(title, ("from", "to", "shape", "how"), _mapping_rows(report))]
    if report.unused:
        shown.append(make_table("Left out", ("tensor", "why"), list(report.unused.items())[:_NUM_SHOWN]))
    shown.append(make_table("Settings that shapes do not show", ("what", "from"), rows))
    if report.finding:
        shown.append(_ranking(report.finding))
    size = megabytes(report.size_bytes or 0)
    return [*shown, *report.notes, f"checkpoint: {printable(report.checkpoint or '')} ({size})"]


def _mapping_rows(report: ConversionReport) -> list[tuple[str, str, str, str]]:
    """Return one row for each tensor; those of all blocks, which differ in the number only, share one."""
    rows: dict[tuple[str, str, str, str], int] = {}
    for mapping in report.mapped:
        block = re.match(r"blocks\.(\d+)\.", mapping.target)
        number = re.compile(rf"(?<=[._]){block[1]}(?=[./])") if block else re.compile(r"(?!)")
        sources = "\n".join(number.sub("*", source, count=1) for source in mapping.sources) or "-"
        size = "x".join(map(str, mapping.shape))
        row = (sources, number.sub("*", mapping.target, count=1), size, mapping.change)
        rows[row] = rows.get(row, 0) + 1
    return [(*row[:3], "; ".join(filter(None, (f"x{n}" if n > 1 else "", row[3])))) for row, n in rows.items()]


def _ranking(finding: Finding) -> Any:
    rows = [
        (
            f"{score.top1:.1f} %", f"{score.cross_entropy:.3f}", *asdict(score.candidate).values(),
            "proposed" if score is finding.proposed else "",
        )
        for score in finding.scores[:_NUM_SHOWN]
    ]  # fmt: skip
    columns = ("top-1", "entropy", "mean, std", "geometry", "resampling", "colours", "labels", "")
    title = f"Preprocessing search, best {len(rows)} of {len(finding.scores)}, {finding.num_images} images"
    return make_table(title, columns, rows)


def _data(report: ConversionReport) -> dict[str, Any]:
    data = {name: getattr(report, name) for name in ("source", "library", "name", "source_sha256", "prefix")}
    data |= {name: getattr(report, name) for name in ("num_parameters", "size_bytes", "checkpoint", "new")}
    data |= {name: list(getattr(report, name)) for name in ("notes", "assumed", "found", "missing", "unexpected")}
    data["mapped"] = [asdict(mapping) for mapping in report.mapped]
    data["reshaped"] = [mapping.target for mapping in report.reshaped]
    data["unused"], data["known"] = dict(report.unused), dict(report.known)
    finding = report.finding
    if finding is not None:
        data["preprocessing_search"] = {
            "num_images": finding.num_images,
            "proposed": asdict(finding.proposed.candidate),
            "settled": list(finding.settled),
            "open": {part: list(values) for part, values in finding.open.items()},
            "better_than_chance": finding.better_than_chance,
            "contradiction": finding.contradiction,
            "scores": [
                {**asdict(s.candidate), "top1": s.top1, "cross_entropy": s.cross_entropy} for s in finding.scores
            ],
        }
    return data
