"""Run a command in the guest, its standard streams over ports of their own."""

import asyncio
import contextlib
from collections.abc import Callable

from atoll.errors import TimedOut
from atoll.layout import VmPaths
from atoll.model.vm import ExecRequest, ExecResult
from atoll.operations import guest_scripts
from atoll.operations.guest_capture import execute_captured, to_its_end
from atoll.operations.guest_running import Drain, LostCommand, Place, Running, Stdin
from atoll.operations.guest_slot import free_slot


async def execute(
    paths: VmPaths,
    name: str,
    request: ExecRequest,
    *,
    stdin: Stdin = None,
    on_stdout: Callable[[bytes], None] | None = None,
    on_stderr: Callable[[bytes], None] | None = None,
    drain: Drain | None = None,
) -> ExecResult:
    """Run a command in the guest of the VM called `name`, to its end; what it leaves in the background runs on.

    Output goes to the sinks as it comes, else into the result; `drain` is awaited after each piece, and the guest waits
    meanwhile. Raises `TimedOut` after the request's timeout,
    `InvalidInput`, and `GuestFailed` when the agent doesn't answer or the guest goes away. Whatever breaks it off, the
    command and its children are killed.
    """
    command = guest_scripts.command_of(request)
    outputs = Outputs(on_stdout, on_stderr)
    try:
        async with asyncio.timeout(request.timeout):
            with free_slot(paths, name) as slot:
                code = None
                if slot is not None:
                    code = await _stream(Place(paths, name, slot, request.cwd or "", drain), command, stdin, outputs)
                if code is None:
                    code = await execute_captured(
                        paths, name, command, cwd=request.cwd, stdin=stdin, out=outputs.out, err=outputs.err
                    )
    except TimeoutError:
        raise TimedOut(
            f"{name}: {request.argv[0]} didn't end in {request.timeout:g} s",
            next_step="It was killed. Give it longer with --timeout.",
        ) from None
    return ExecResult(exit_code=code, stdout=bytes(outputs.kept_out), stderr=bytes(outputs.kept_err))


class Outputs:
    """The caller's sinks, or buffers where there are none."""

    def __init__(self, on_stdout: Callable[[bytes], None] | None, on_stderr: Callable[[bytes], None] | None) -> None:
        self.kept_out = bytearray()
        self.kept_err = bytearray()
        self.out: Callable[[bytes], object] = on_stdout or self.kept_out.extend
        self.err: Callable[[bytes], object] = on_stderr or self.kept_err.extend


async def _stream(how: Place, command: list[str], stdin: Stdin, outputs: Outputs) -> int | None:
    """The exit code; None in a guest that has no ports, or no sh."""
    with contextlib.ExitStack() as stack:
        # The host is there first: what a port's reader or writer does without a host is QEMU's choice.
        err, out = (stack.enter_context(contextlib.closing(how.slot.port(kind))) for kind in ("err", "out"))
        into = None if stdin is None else stack.enter_context(contextlib.closing(how.slot.port("in")))
        running = Running(how=how, sockets=(out, err))
        try:
            if not await running.start(command, (outputs.out, outputs.err), with_stdin=into is not None):
                return None
            await running.attend(into, stdin)
            if into is not None:
                into.close()
            await running.finish()
        except LostCommand:
            raise
        except BaseException:
            # Ctrl-C, the timeout, a sink that fails: nobody waits for the command any more.
            await to_its_end(running.kill())
            raise
        return running.streams[0].code
