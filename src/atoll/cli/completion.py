"""`completion`: lets the shell complete commands, options, and the names of VMs and images."""

import click
from click.shell_completion import get_completion_class

from atoll.errors import InvalidInput


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion_command(shell: str) -> None:
    """Print what makes a shell complete Atoll's commands.

    \b
    Examples:
      eval "$(atoll completion bash)"                        in ~/.bashrc
      eval "$(atoll completion zsh)"                         in ~/.zshrc
      atoll completion fish > ~/.config/fish/completions/atoll.fish
    """
    from atoll.cli.main import cli

    kind = get_completion_class(shell)
    if kind is None:
        raise InvalidInput(f"there is no completion for {shell}", next_step="Use bash, zsh or fish.")
    if shell == "bash":
        # click's own `source` runs bash to see its version; all since 4.4 will do.
        kind._check_version = staticmethod(lambda: None)  # type: ignore[attr-defined]
    click.echo(kind(cli, {}, "atoll", "_ATOLL_COMPLETE").source())


def vm_names() -> list[str]:
    """Names for the shell: from the records, without a look at any process, and none when something is wrong."""
    from atoll.errors import AtollError
    from atoll.operations.services import Services

    services = Services()
    try:
        return [vm.name for vm in services.records.vms()]
    except AtollError:
        return []
    finally:
        services.close()


def image_names() -> list[str]:
    """As `vm_names`."""
    from atoll.errors import AtollError
    from atoll.operations.services import Services

    services = Services()
    try:
        return [name for image in services.records.images() for name in (image.name, *image.tags)]
    except AtollError:
        return []
    finally:
        services.close()
