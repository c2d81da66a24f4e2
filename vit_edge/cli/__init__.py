"""The command line: `vit-edge COMMAND`. One module a command; heavy imports happen inside the commands."""

from __future__ import annotations

import errno
import importlib
import sys
from collections import UserDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from vit_edge import __version__
from vit_edge.cli.messages import print_message
from vit_edge.cli.streams import drop_stdout, prepare_streams
from vit_edge.errors import Interrupted, ResourceExhausted, VitEdgeError, misfit

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

__all__ = ["cli", "main"]

# In the order in which a model goes through them: where the command is below this package, and a summary that fits in
# one line of 80 columns. Only the command that is called is imported.
_COMMANDS: dict[str, tuple[str, str]] = {
    "deploy": ("workstation.deploy.deploy", "Export, quantize, verify and package in one command"),
    "train": ("workstation.train.train", "Train a Vision Transformer on an image folder"),
    "convert": ("workstation.convert.convert", "Convert weights of timm, Hugging Face or torchvision"),
    "export": ("workstation.export.export", "Export a network to one ONNX file"),
    "quantize": ("workstation.quantize.quantize", "Quantize a float32 model file to INT8 or float16"),
    "verify": ("workstation.verify.verify", "Compare a model file with its float32 reference"),
    "explain": ("workstation.explain.explain", "Show where the error of an INT8 file comes from"),
    "classify": ("device.classify.classify", "Classify images with a model file"),
    "embed": ("device.embed.embed", "Compute the vectors of images with an encoder file"),
    "benchmark": ("benchmark.command.benchmark", "Measure latency and throughput of model files"),
    "tune": ("device.tune.tune", "Find the fastest engine and number of threads"),
    "bundle": ("device.bundle.bundle", "Make one runnable file of a model and the runtime"),
    "repository": ("device.repository.repository", "Write a model repository for an inference server"),
    "report": ("workstation.report.report", "Make one HTML page of results"),
    "inspect": ("device.inspect.inspect", "Show what a model file contains"),
    "doctor": ("device.doctor.doctor", "Check this machine: engines, CPU, packages"),
    "seal": ("device.seal.seal", "Seal a model file again after a deliberate edit"),
    "sign": ("device.sign.sign", "Sign a model file, folder or application with your key"),
    "verify-signature": ("device.sign.verify_signature", "Check who signed a model file, folder or application"),
    "help": ("help.help_command", "Show the help of a command"),
    "completion": ("help.completion", "Print shell completion for bash, zsh or fish"),
}


class _Commands(UserDict[str, Any]):
    """The commands by name; each is imported when it is asked for."""

    def __getitem__(self, name: str) -> Any:
        module, _, function = self.data[name][0].rpartition(".")
        return getattr(importlib.import_module(f"{__name__}.{module}"), function)


class _InOrder(click.Group):
    """A group that lists its commands in the order a model goes through them, with their summaries in full."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in _COMMANDS.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        options = click.Command.shell_complete(self, ctx, incomplete)
        shown = [(name, summary) for name, (_, summary) in _COMMANDS.items() if name.startswith(incomplete)]
        return [CompletionItem(name, help=summary) for name, summary in shown] + options


@click.group(
    cls=_InOrder,
    commands=_Commands(_COMMANDS),
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 2 usage, 3 bad input, 4 not trusted, 5 disk or memory, 6 verification, 7 no engine.",
)
@click.version_option(__version__, prog_name="vit-edge")
def cli() -> None:
    """Take a Vision Transformer from a checkpoint to the device, and verify each step.

    \b
    All steps in one command:
      vit-edge deploy hf:google/vit-base-patch16-224 --data images/ --max-drop 1
    \b
    One step at a time:
      vit-edge train images/ --out run/
      vit-edge export run/best.safetensors -o model.onnx
      vit-edge quantize model.onnx --calibration images/train -o model.int8.onnx
      vit-edge verify model.int8.onnx --reference model.onnx --data images/test
      vit-edge classify model.int8.onnx image.jpg

    `vit-edge COMMAND -h` shows the options of a command.
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; every error of the user is two lines, without a traceback."""
    prepare_streams()
    given = sys.argv[1:] if arguments is None else arguments
    as_json = "--json" in given
    try:
        cli.main(args=arguments, prog_name="vit-edge", standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        _show_usage(error)
        if as_json:
            from vit_edge.cli.output import print_error_json

            what = {"type": type(error).__name__, "exit_code": error.exit_code, "reason": error.format_message()}
            print_error_json(getattr(getattr(error, "ctx", None), "info_name", None) or "vit-edge", what)
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        stopped = Interrupted("stopped", reason="interrupted by the user", remedy="run the command again")
        return _fail(stopped, as_json=as_json)
    except VitEdgeError as error:
        return _fail(error, as_json=as_json)
    except MemoryError:
        remedy = "use smaller or fewer inputs"
        return _fail(ResourceExhausted("cannot go on", reason="memory ran out", remedy=remedy), as_json=as_json)
    except (BrokenPipeError, SystemExit):
        # The reader went away (`| head`): nothing is wrong. click and rich turn it into SystemExit.
        drop_stdout()
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            return _fail(_crash(error, given), as_json=as_json)
        drop_stdout()
        reason = (error.strerror or str(error)).lower()
        return _fail(ResourceExhausted("cannot write the result", reason=reason, remedy="free some space"))
    except ImportError as error:
        return _fail(misfit(error), as_json=as_json)
    except Exception as error:
        return _fail(_crash(error, given), as_json=as_json)
    return 0


def _crash(error: Exception, arguments: Sequence[str]) -> VitEdgeError:
    from vit_edge.cli.crash_report import crash

    return crash(error, arguments)


def _fail(error: VitEdgeError, *, as_json: bool = False) -> int:
    if as_json and not error.in_json:
        from vit_edge.cli.output import error_fields, print_error_json

        print_error_json("vit-edge", error_fields(error))
    print_message(str(error), label="error")
    return error.exit_code


def _show_usage(error: click.ClickException) -> None:
    """Print wrong usage as all errors are printed, after the usage line of the command."""
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":  # click 8.1 has none: it prints the help itself
        error.show()
        return
    if context is not None:
        print_message(context.get_usage())
    remedy = f"\ntry: {context.command_path} -h" if context is not None else ""
    print_message(f"{error.format_message()}{remedy}", label="error")
