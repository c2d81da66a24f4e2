"""The command line: `vit-edge COMMAND`. One module a command; heavy imports happen inside the commands."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Sequence

import click

from vit_edge import __version__
from vit_edge.cli.device.benchmark import benchmark
from vit_edge.cli.device.bundle import bundle
from vit_edge.cli.device.classify import classify
from vit_edge.cli.device.doctor import doctor
from vit_edge.cli.device.inspect import inspect
from vit_edge.cli.device.seal import seal
from vit_edge.cli.device.tune import tune
from vit_edge.cli.output import error_fields, print_error_json
from vit_edge.cli.workstation.convert import convert
from vit_edge.cli.workstation.deploy import deploy
from vit_edge.cli.workstation.explain import explain
from vit_edge.cli.workstation.export import export
from vit_edge.cli.workstation.quantize import quantize
from vit_edge.cli.workstation.report import report
from vit_edge.cli.workstation.train import train
from vit_edge.cli.workstation.verify import verify
from vit_edge.errors import Interrupted, ResourceExhausted, VitEdgeError

__all__ = ["cli", "main"]

_COMMANDS = (
    train, convert, export, quantize, verify, explain, classify, tune, bundle, benchmark, deploy, report, inspect,
    doctor, seal,
)  # fmt: skip


class _InOrder(click.Group):
    """A group that lists its commands in the order a model goes through them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [command.name for command in _COMMANDS if command.name]


@click.group(
    cls=_InOrder,
    commands=_COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 2 usage, 3 bad input, 4 not trusted, 5 disk or memory, 6 verification, 7 no engine.",
)
@click.version_option(__version__, prog_name="vit-edge")
def cli() -> None:
    """Take a Vision Transformer from a checkpoint to the device, and prove that nothing was lost.

    \b
    A typical way through:
      vit-edge train images/ --out run/
      vit-edge export run/best.safetensors -o model.onnx
      vit-edge quantize model.onnx --calibration images/train -o model.int8.onnx
      vit-edge verify model.int8.onnx --reference model.onnx --data images/test
      vit-edge classify model.int8.onnx image.jpg

    `vit-edge COMMAND -h` explains each.
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; every error that is the user's is one sentence, no traceback."""
    as_json = "--json" in (sys.argv[1:] if arguments is None else arguments)
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
        stopped = Interrupted("stopped", reason="interrupted by the user", remedy="nothing unfinished was kept")
        return _fail(stopped, as_json=as_json)
    except VitEdgeError as error:
        return _fail(error, as_json=as_json)
    except MemoryError:
        return _fail(ResourceExhausted("cannot go on", reason="memory ran out", remedy="use smaller or fewer inputs"))
    except (BrokenPipeError, SystemExit):
        # The reader went away (`| head`): nothing is wrong. click and rich turn it into SystemExit.
        _forget_stdout()
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            return _bug()
        _forget_stdout()
        reason = (error.strerror or str(error)).lower()
        return _fail(ResourceExhausted("cannot write the result", reason=reason, remedy="free some space"))
    except Exception:
        return _bug()
    return 0


def _bug() -> int:
    traceback.print_exc()
    click.echo("error: this is a bug in vit-edge; please report the lines above", err=True)
    return 1


def _forget_stdout() -> None:
    """Keep the interpreter from flushing what is left into an output that takes no more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(error: VitEdgeError, *, as_json: bool = False) -> int:
    if as_json and not error.in_json:
        print_error_json("vit-edge", error_fields(error))
    click.echo(f"error: {error}", err=True)
    return error.exit_code
