"""Find words that this project does not use in what people read.

`python -m tests.policy.words` prints FILE:LINE: WORD (use ...): TEXT for help texts, errors, log messages, pages and
templates; with `--docstrings` for the first lines of docstrings as well. Arguments are paths to look at only.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from tests.policy.ranks import modules

__all__ = ["AVOID", "Fault", "faults_in", "faults_of_text"]

ROOT = Path(__file__).resolve().parent.parent.parent
# "The product of two matrices" is arithmetic; "every product runs in INT8" means an operator.
_NOT_ARITHMETIC = (r"(?<!matrix )(?<!dot )(?<!pairs of )(?<!sums )(?<!sum four )", r"(?! of\b| with\b| in (?:16|32)\b)")
# What is not said: what is, as docs/contributing/words.md has it.
AVOID = {
    r"pictures?": "image",
    r"answers?|answered|answering": "class, label, prediction, logits; respond",
    r"foreign|theirs": "third-party",
    r"made elsewhere": "third-party",
    rf"{_NOT_ARITHMETIC[0]}products?{_NOT_ARITHMETIC[1]}": "quantized op, quantizable op, MatMul/Gemm/Conv",
    r"takes? integers|in integers|integers enter": "quantized, runs in INT8",
    r"stays? float|staying float|stayed float": "runs in float32",
    r"judge[sd]?|judging|judgements?": "verdict, accept, reject; evaluation images",
    r"outlook|certify at best": "minimum certifiable drop",
    r"ladders?|rungs?|climbs?|climbed": "search trace, step",
    r"waterfalls?": "error breakdown",
    r"told|nobody|somebody|whoever|whatever": "name the subject; user-specified, assumed",
    r"said|lies": "name the subject; is in, is at",
    r"beside": "next to, in addition to",
    r"detective|evidence": "preprocessing search, labelled images",
    r"deploy form": "fused inference graph",
    r"averaged min-max": "moving-average observer",
    r"value-scaling|value scaling": "cross-layer equalization",
    r"guards?|guarded": "operator allow-list, check",
    r"promise[sd]?": "measured, validated, tested on",
    r"holders?": "model slot",
    r"halved|halving": "convert to float16",
    r"twins?": "clone",
    r"a process apart|of its own|of their own": "sandbox, subprocess; own",
    r"held against": "compared with",
    r"what is to be": "name the object",
    r"comes? nearer": "is more accurate",
    r"the others": "name them",
    r"the way through|way through": "path, workflow",
    r"fp16|f16|half precision": "float16",
    r"fp32|f32": "float32",
    r"bf16": "bfloat16",
}
_PATTERN = re.compile("|".join(rf"\b(?:{words})\b" for words in AVOID), flags=re.IGNORECASE)
# In quoted speech of files and users, in names and in code, words stay as they are.
_CODE = re.compile(r"`[^`\n]*`|\[[^\]\n]*\]\([^)\n]*\)|https?://\S+|\{[{%#].*?[}%#]\}|<[^>]*>")
_MESSAGE_NAMES = {"what", "reason", "remedy", "advice", "note", "warning"}
_LOG_METHODS = {"debug", "info", "warning", "error", "exception", "critical"}
_LOGS = {"_log", "log", "logger", "_LOG", "logging"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """A word to avoid: where, which, what to use instead, and the text around it."""

    path: Path
    line: int
    word: str
    instead: str
    text: str

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}: {self.word} (use {self.instead}): {self.text[:110]}"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Text:
    path: Path
    line: int
    text: str
    is_reason: bool = False


def faults_of_text(text: str) -> list[tuple[str, str]]:
    """Return (word, what to use instead) of each word to avoid; inline code, links and addresses do not count."""
    plain = _CODE.sub(" ", text)
    return [(match.group(), _instead(match.group())) for match in _PATTERN.finditer(plain)]


def faults_in(root: Path = ROOT, *, docstrings: bool = False) -> Iterator[Fault]:
    """Yield the faults of all that people read below `root`."""
    texts = [*_help_texts(), *_messages(root), *_pages(root), *_templates(root)]
    for item in texts + ([*_docstrings(root)] if docstrings else []):
        found = faults_of_text(item.text)
        if item.is_reason and re.match(r"its?\b", item.text, flags=re.IGNORECASE):
            found.append((item.text.split()[0], "a reason that names its subject"))
        for word, instead in found:
            yield Fault(path=item.path, line=item.line, word=word, instead=instead, text=" ".join(item.text.split()))


def _instead(word: str) -> str:
    bare = {words.replace(_NOT_ARITHMETIC[0], "").replace(_NOT_ARITHMETIC[1], ""): use for words, use in AVOID.items()}
    return next(use for words, use in bare.items() if re.fullmatch(words, word, flags=re.IGNORECASE))


def _help_texts() -> Iterator[_Text]:
    """Yield the texts of every command and option, found through the click tree, with the line that holds each."""
    from vit_edge.cli import cli

    places = {text: place for place, text in _constants(ROOT / "vit_edge" / "cli")}
    unknown = (ROOT / "vit_edge" / "cli" / "__init__.py", 1)
    for command in (cli, *cli.commands.values()):
        for text in filter(None, (command.help, command.epilog, command.short_help)):
            code = getattr(getattr(command.callback, "__wrapped__", command.callback), "__code__", None)
            yield from _lines(*((Path(code.co_filename), code.co_firstlineno) if code else unknown), text, moves=False)
        for parameter in command.params:
            text = getattr(parameter, "help", None)
            if text:
                path, line = places.get(text, unknown)
                yield _Text(path=path, line=line, text=text)


def _constants(folder: Path) -> Iterator[tuple[tuple[Path, int], str]]:
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield (path, node.lineno), node.value


def _messages(root: Path) -> Iterator[_Text]:
    """Yield what errors and log messages say, as far as it stands in the code as text."""
    for path in modules(root).values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for kind, value in _spoken(node):
                if text := _text_of(value):
                    yield _Text(path=path, line=value.lineno, text=text, is_reason=kind == "reason")


def _spoken(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """Yield (what it is, expression) of the parts of a node that a person will read."""
    if isinstance(node, ast.Call):
        keywords = {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
        yield from ((name, keywords[name]) for name in sorted(_MESSAGE_NAMES & keywords.keys()))
        method = node.func
        is_log = isinstance(method, ast.Attribute) and method.attr in _LOG_METHODS and _name(method.value) in _LOGS
        is_echo = _name(method) in {"echo", "say", "require"}
        if node.args and (is_log or is_echo or {"reason", "remedy"} & keywords.keys()):
            yield "what", node.args[0]
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
        yield from (("raised", argument) for argument in node.exc.args)
    if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        yield from ((name, node.value) for name in map(_name, targets) if name in _MESSAGE_NAMES)


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _text_of(node: ast.expr) -> str:
    """Return the text of an expression, with `...` for what is put in."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(_text_of(part) if isinstance(part, ast.Constant) else "..." for part in node.values)
    if isinstance(node, ast.BinOp):
        return f"{_text_of(node.left)}{_text_of(node.right)}"
    if isinstance(node, ast.IfExp):
        return f"{_text_of(node.body)} / {_text_of(node.orelse)}"
    return ""


def _pages(root: Path) -> Iterator[_Text]:
    """Yield the lines of README and docs outside of code; of results.md not the tables, whose names are history."""
    pages = [*root.glob("*.md"), *(root / "docs").rglob("*.md"), *(root / "examples").rglob("*.md")]
    for path in sorted(pages):
        if path.name in {"CODE_OF_CONDUCT.md", "vit.pt-BR.md"}:  # a standard text, and Portuguese
            continue
        in_code = False
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if line.lstrip().startswith("```"):
                in_code = not in_code
            elif not (in_code or line.startswith("    ") or (path.name == "results.md" and line.startswith("|"))):
                yield _Text(path=path, line=number, text=line)


def _templates(root: Path) -> Iterator[_Text]:
    for path in sorted((root / "vit_edge" / "report").glob("*.[hm][td]*")):
        text = re.sub(r"<(style|script)\b.*?</\1>", _blank, path.read_text(encoding="utf-8"), flags=re.DOTALL)
        text = re.sub(r"\{[{%#].*?[}%#]\}|<[^>]*>", _blank, text, flags=re.DOTALL)
        yield from _lines(path, 1, text)


def _blank(match: re.Match[str]) -> str:
    return "\n" * match.group().count("\n") or " "


def _lines(path: Path, first: int, text: str, *, moves: bool = True) -> Iterator[_Text]:
    for number, line in enumerate(text.splitlines()):
        yield _Text(path=path, line=first + number * moves, text=line)


def _docstrings(root: Path) -> Iterator[_Text]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in modules(root).values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, documented) and (text := ast.get_docstring(node)):
                yield _Text(path=path, line=node.body[0].lineno, text=text.splitlines()[0])


def _main(arguments: list[str]) -> int:
    paths = [argument for argument in arguments if not argument.startswith("-")]
    found = [str(fault) for fault in faults_in(docstrings="--docstrings" in arguments)]
    found = sorted({line for line in found if not paths or line.startswith(tuple(paths))})
    click.echo("\n".join([*found, f"{len(found)} words to avoid"]))
    return bool(found)


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
