"""`vit-edge help` and `vit-edge completion`."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from vit_edge.errors import UsageError

__all__ = ["completion", "help_command"]

_NAMES = {"help_option_names": ["-h", "--help"]}
_PROGRAM, _VARIABLE = "vit-edge", "_VIT_EDGE_COMPLETE"


@click.command("help", context_settings=_NAMES)
@click.argument("command", required=False)
@click.pass_context
def help_command(context: click.Context, command: str | None) -> None:
    """Show the help of COMMAND, or of vit-edge."""
    above = context.parent
    assert above is not None  # it is a command of the group
    group = above.command
    assert isinstance(group, click.Group)
    if command is None:
        click.echo(group.get_help(above))
        return
    found = group.get_command(above, command)
    if found is None:
        raise UsageError("cannot show the help", reason=f"there is no command {command!r}", remedy="vit-edge help")
    click.echo(found.get_help(click.Context(found, info_name=command, parent=above)))


@click.command("completion", context_settings=_NAMES)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the script that completes commands, options and their values in SHELL: bash, zsh or fish.

    \b
    Switch it on for every new shell:
      bash: echo 'eval "$(vit-edge completion bash)"' >> ~/.bashrc
      zsh:  echo 'eval "$(vit-edge completion zsh)"' >> ~/.zshrc
      fish: vit-edge completion fish > ~/.config/fish/completions/vit-edge.fish
    """
    made = get_completion_class(shell)
    assert made is not None  # click has these three
    # Only the script is printed; bash is not asked for its version, which may not be installed here.
    script = made(context.find_root().command, {}, _PROGRAM, _VARIABLE)
    click.echo(script.source_template % script.source_vars())
