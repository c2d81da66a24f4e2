"""The command line: `vit-edge COMMAND`. One module a command; heavy imports happen inside the commands."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

import click

from vit_edge import __version__
from vit_edge.cli.crash_report import crash
from vit_edge.cli.device.benchmark import benchmark
from vit_edge.cli.device.bundle import bundle
from vit_edge.cli.device.classify import classify
from vit_edge.cli.device.doctor import doctor
from vit_edge.cli.device.inspect import inspect
from vit_edge.cli.device.seal import seal
from vit_edge.cli.device.sign import sign, verify_signature
from vit_edge.cli.device.tune import tune
from vit_edge.cli.help import completion, help_command
from vit_edge.cli.output import error_fields, print_error_json
from vit_edge.cli.streams import drop_stdout, prepare_streams
from vit_edge.cli.workstation.convert import convert
from vit_edge.cli.workstation.deploy import deploy
from vit_edge.cli.workstation.explain import explain
from vit_edge.cli.workstation.export import export
from vit_edge.cli.workstation.quantize import quantize
from vit_edge.cli.workstation.report import report
from vit_edge.cli.workstation.train import train
from vit_edge.cli.workstation.verify import verify
from vit_edge.errors import Interrupted, ResourceExhausted, VitEdgeError, misfit

__all__ = ["cli", "main"]

# In the order in which a model goes through them, with a summary that fits in one line of 80 columns.
_COMMANDS: tuple[tuple[click.Command, str], ...] = (
    (deploy, "Export, quantize, verify and package in one command"),
    (train, "Train a Vision Transformer on an image folder"),
    (convert, "Convert weights of timm, Hugging Face or torchvision"),
    (export, "Export a network to one ONNX file"),
    (quantize, "Quantize a float32 model file to INT8 or float16"),
    (verify, "Compare a model file with its float32 reference"),
    (explain, "Show where the error of an INT8 file comes from"),
    (classify, "Classify images with a model file"),
    (benchmark, "Measure latency and throughput of model files"),
    (tune, "Find the fastest engine and number of threads"),
    (bundle, "Make one runnable file of a model and the runtime"),
    (report, "Make one HTML page of results"),
    (inspect, "Show what a model file contains"),
    (doctor, "Check this machine: engines, CPU, packages"),
    (seal, "Seal a model file again after a deliberate edit"),
    (sign, "Sign a model file, folder or application with your key"),
    (verify_signature, "Check who signed a model file, folder or application"),
    (help_command, "Show the help of a command"),
    (completion, "Print shell completion for bash, zsh or fish"),
)


class _InOrder(click.Group):
    """A group that lists its commands in the order a model goes through them, with their summaries in full."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [command.name for command, _ in _COMMANDS if command.name]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(command.name or "", summary) for command, summary in _COMMANDS])


@click.group(
    cls=_InOrder,
    commands=[command for command, _ in _COMMANDS],
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 2 usage, 3 bad input, 4 not trusted, 5 disk or memory, 6 verification, 7 no engine.",
)
@click.version_option(__version__, prog_name="vit-edge")
def cli() -> None:
    """Take a Vision Transformer from a checkpoint to the device, and verify each step.

    \b
    All steps in one command:
      vit-edge deploy hf:google/vit-base-patch16-224 --data images/
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
        error.show()
        if as_json:
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
            return _fail(crash(error, given), as_json=as_json)
        drop_stdout()
        reason = (error.strerror or str(error)).lower()
        return _fail(ResourceExhausted("cannot write the result", reason=reason, remedy="free some space"))
    except ImportError as error:
        return _fail(misfit(error), as_json=as_json)
    except Exception as error:
        return _fail(crash(error, given), as_json=as_json)
    return 0


def _fail(error: VitEdgeError, *, as_json: bool = False) -> int:
    if as_json and not error.in_json:
        print_error_json("vit-edge", error_fields(error))
    plain = "NO_COLOR" in os.environ
    click.echo(f"{'error:' if plain else click.style('error:', fg='red', bold=True)} {error}", err=True)
    return error.exit_code
