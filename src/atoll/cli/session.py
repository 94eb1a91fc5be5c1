"""Opens the host for a command, and lets signals cancel what the command does."""

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, TypeVar

import click

import atoll
from atoll.cli.failures import exit_code_of, note, settings, tell
from atoll.errors import AtollError, Cancelled
from atoll.platform.api import AsyncHost, AsyncVm

R = TypeVar("R")
UNDONE = "what it had begun was undone"
AT_ONCE = 32
"""How many VMs one command works on at the same time."""


def perform(action: Callable[[AsyncHost], Awaitable[R]], *, cancelled: str = UNDONE) -> R:
    """Run `action` with this computer's host.

    Ctrl-C, SIGTERM and SIGHUP cancel it; when it has ended, `Cancelled` tells `cancelled`, or nothing is told if that
    is empty (a command that only looks).
    """
    return asyncio.run(_perform(action, cancelled))


async def _perform(action: Callable[[AsyncHost], Awaitable[R]], cancelled: str) -> R:
    with interruptible(cancelled):
        async with atoll.connect_async(settings().host) as host:
            for told in host.notices():
                note(told)
            return await action(host)


@contextlib.contextmanager
def interruptible(cancelled: str) -> Iterator[None]:
    """Let signals cancel what is inside; when it has ended, `Cancelled` tells `cancelled`, as `perform` says."""
    with cancelled_by_signals() as received:
        try:
            yield
        except asyncio.CancelledError:
            if not received:
                raise
            raise _ended_by(received[0], cancelled) from None


def _ended_by(number: int, cancelled: str) -> Exception:
    if not cancelled:
        return click.exceptions.Exit(128 + number)
    error = Cancelled("cancelled", cancelled)
    error.exit_code = 128 + number
    return error


@contextlib.contextmanager
def cancelled_by_signals() -> Iterator[list[int]]:
    """Let the first signal cancel the current task; yields the list of signals that came."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    received: list[int] = []

    def on_signal(number: int) -> None:
        received.append(number)
        if len(received) == 1:
            task.cancel()
        else:
            note("it is being undone; that may take a minute.")

    # A signal that is ignored from the start stays so: nohup, and jobs in the background of a script.
    heeded = [
        each for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) != signal.SIG_IGN
    ]
    for each in heeded:
        loop.add_signal_handler(each, on_signal, each)
    try:
        yield received
    finally:
        for each in heeded:
            loop.remove_signal_handler(each)


async def each_vm(
    host: AsyncHost, references: Sequence[str], act: Callable[[AsyncVm], Awaitable[dict[str, Any] | None]]
) -> tuple[list[dict[str, Any]], int]:
    """Do something to several VMs at once, and tell each failure.

    Returns the ids and names of those that went well, with what `act` tells of each, and the first failure's exit code.
    """
    found, places = settings(), asyncio.Semaphore(AT_ONCE)

    async def one(reference: str) -> dict[str, Any]:
        async with places:
            vm = await host.get(reference)
            told = {"id": vm.id, "name": vm.name}
            return told | (await act(vm) or {})

    results = await asyncio.gather(*(one(each) for each in dict.fromkeys(references)), return_exceptions=True)
    code = 0
    for result in results:
        if isinstance(result, AtollError):
            tell(result, found.format)
            code = code or exit_code_of(result, found)
        elif isinstance(result, BaseException):
            raise result
    return [result for result in results if isinstance(result, dict)], code
