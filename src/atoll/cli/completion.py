"""`completion`: lets the shell complete commands, options, and the names of VMs, snapshots, networks and images."""

import os
from collections.abc import Callable

import click
from click.shell_completion import BashComplete, get_completion_class

from atoll.errors import AtollError, InvalidInput
from atoll.operations.services import Services


class _Bash(BashComplete):
    """click's own, but for VM@SNAPSHOT: bash splits words at '@', and replaces what begins with it."""

    source_template = r"""
%(complete_func)s() {
    local IFS=$'\n' words=() before='' word response completion type value

    for word in "${COMP_WORDS[@]:0:COMP_CWORD + 1}"; do
        if [[ ${#words[@]} -gt 0 && -n $word && ( $word == @* || ${words[-1]} == *@ ) ]]; then
            words[-1]+=$word
        else
            words+=("$word")
        fi
    done
    [[ ${words[-1]} == "${COMP_WORDS[COMP_CWORD]}" ]] || before=${words[-1]%%@*}

    response=$(env COMP_WORDS="${words[*]}" COMP_CWORD=$((${#words[@]} - 1)) %(complete_var)s=bash_complete $1)

    for completion in $response; do
        IFS=',' read type value <<< "$completion"
        if [[ $type == 'dir' ]]; then
            COMPREPLY=()
            compopt -o dirnames
        elif [[ $type == 'file' ]]; then
            COMPREPLY=()
            compopt -o default
        elif [[ $type == 'plain' ]]; then
            COMPREPLY+=("${value#"$before"}")
        fi
    done
}

complete -o nosort -F %(complete_func)s %(prog_name)s
"""

    def source(self) -> str:
        # click's runs bash to see its version; all since 4.4 will do.
        return self.source_template % self.source_vars()


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

    kind = _Bash if shell == "bash" else get_completion_class(shell)
    if kind is None:
        raise InvalidInput(f"there is no completion for {shell}", next_step="Use bash, zsh or fish.")
    click.echo(kind(cli, {}, "atoll", "_ATOLL_COMPLETE").source())


def _names(look: Callable[[Services], list[str]]) -> list[str]:
    """Names for the shell: from the records, without a look at any process, and none when something is wrong."""
    if os.environ.get("ATOLL_HOST"):
        # Those of this computer would be wrong, and another one's take too long.
        return []
    services = Services()
    try:
        return look(services)
    except AtollError:
        return []
    finally:
        services.close()


def vm_names() -> list[str]:
    return _names(lambda services: [vm.name for vm in services.records.vms()])


def snapshot_names(vm: str) -> list[str]:
    """Those of a VM, which is named as anywhere."""
    return _names(lambda services: [node.name for node in services.records.snapshots(services.find_vm(vm).id)])


def network_names() -> list[str]:
    return _names(lambda services: [network.name for network in services.records.networks()])


def image_names() -> list[str]:
    return _names(lambda services: [name for image in services.records.images() for name in (image.name, *image.tags)])


def group_names() -> list[str]:
    return _names(lambda services: [group.name for group in services.records.groups()])
