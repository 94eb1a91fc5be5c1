"""Terminals in a real guest."""

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from tests.helpers.machines import Machine
from tests.vm.guest_of_a_module import guest_of_a_module

from atoll.errors import Busy
from atoll.operations.guest_shell import Shell, open_console, open_shell
from atoll.platform.api import Terminal

pytestmark = [pytest.mark.vm, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def vm() -> AsyncIterator[Machine]:
    async with guest_of_a_module() as machine:
        yield machine


async def seen(terminal: Terminal, wanted: bytes) -> bytes:
    """What the terminal shows until `wanted` is in it, or until it ends."""
    shown = b""
    async with asyncio.timeout(20):
        while wanted not in shown and (data := await terminal.read()):
            shown += data
    assert wanted in shown, shown
    return shown


async def shell_of(vm: Machine, *command: str) -> Shell:
    return await open_shell(vm._services.layout.vm(vm.id), vm.name, command=command)


async def test_a_shell_is_a_real_terminal(vm: Machine) -> None:
    shell = await shell_of(vm)
    try:
        await shell.write(b"tty; stty size; echo $((40 + 2)):$TERM\n")
        assert b"24 80" in await seen(shell, b"42:xterm-256color")
        await shell.resize(rows=33, columns=99)
        await shell.write(b"stty size\n")
        await seen(shell, b"33 99")
        await shell.write(b"sleep 1000\n")
        await seen(shell, b"sleep 1000")
        await asyncio.sleep(0.5)
        await shell.write(b"\x03echo $((41 + 2))\n")
        await seen(shell, b"43")
        await shell.write(b"exit 5\n")
        while await shell.read():
            pass
        assert shell.exit_code == 5
    finally:
        await shell.close()


async def test_a_window_that_changes_is_told_to_the_program(vm: Machine) -> None:
    shell = await shell_of(vm, "sh", "-c", "trap 'stty size' WINCH; echo ready; while :; do sleep 0.1; done")
    try:
        await seen(shell, b"ready")
        await shell.resize(rows=11, columns=22)
        await seen(shell, b"11 22")
    finally:
        await shell.close()


async def test_closing_hangs_up(vm: Machine) -> None:
    shell = await shell_of(vm)
    await shell.write(b"sleep 4801 & sleep 4802\n")
    while await vm.sh("ps | grep -c '[s]leep 480' || true") != "2":
        await asyncio.sleep(0.1)
    await shell.close()
    assert await vm.sh("ps | grep -c '[s]leep 4802' || true") == "0"


async def test_a_session_shows_nothing_of_the_one_before(vm: Machine) -> None:
    first = await shell_of(vm, "sh", "-c", "while :; do echo earlier; done")
    await seen(first, b"earlier")
    await first.close()
    second = await shell_of(vm, "echo", "later")
    try:
        assert b"earlier" not in await seen(second, b"later")
    finally:
        await second.close()


async def test_a_fourth_shell_is_told_that_all_are_in_use(vm: Machine) -> None:
    shells = [await shell_of(vm, "sleep", "100") for _ in range(3)]
    try:
        with pytest.raises(Busy, match="in use"):
            await shell_of(vm)
    finally:
        for shell in shells:
            await shell.close()
    await (await shell_of(vm)).close()


async def test_the_console_is_for_one_and_leaves_the_guest_alone(vm: Machine) -> None:
    paths = vm._services.layout.vm(vm.id)
    console = await open_console(paths, vm.name)
    try:
        await console.write(b"\necho $((40 + 2))\n")
        await seen(console, b"42")
        with pytest.raises(Busy, match="in use"):
            await open_console(paths, vm.name)
    finally:
        await console.close()
    again = await open_console(paths, vm.name)
    await again.write(b"echo $((41 + 2))\n")
    await seen(again, b"43")
    await again.close()
