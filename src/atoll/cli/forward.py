"""`port forward` and `vnc`: listeners on this computer whose connections lead to a VM, wherever that is."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING

import click

from atoll.cli.failures import settings, tell
from atoll.cli.options import VM, parse_ports
from atoll.errors import AlreadyExists, AtollError, InvalidInput

if TYPE_CHECKING:
    from atoll.platform.api import AsyncHost, Connection

Open = Callable[[], Awaitable["Connection"]]
CHUNK = 64 << 10


@click.command("forward")
@click.argument("vm", type=VM)
@click.argument("ports", nargs=-1, required=True, metavar="[ADDRESS:]HERE:GUEST...")
def forward(vm: str, ports: tuple[str, ...]) -> None:
    """Let programs on this computer reach a VM's TCP ports, until Ctrl-C.

    The ports needn't be published, and with -H the VM is another computer's.

    \b
    Examples:
      atoll port forward web 8080:80
      atoll -H server port forward web 2222:22 5432:5432
    """
    from atoll.cli.session import perform

    wanted = [port for text in ports for port in parse_ports(text)]
    if udp := next((port for port in wanted if port.protocol != "tcp"), None):
        raise InvalidInput(
            f"port {udp.guest_port}/udp can't be forwarded", next_step="Publish it: `atoll port add`. TCP can."
        )

    async def action(host: "AsyncHost") -> None:
        found = await host.get(vm)
        async with contextlib.AsyncExitStack() as stack:
            for port in wanted:
                number = port.guest_port
                await stack.enter_async_context(
                    _listening(port.host_address, port.host_port, lambda number=number: found.connect(number))  # type: ignore[misc]
                )
                click.echo(f"{port.host_address}:{port.host_port} leads to port {number} of {found.name}", err=True)
            await asyncio.Event().wait()

    perform(action, cancelled="")


@click.command("vnc")
@click.argument("vm", type=VM)
@click.argument("port", type=click.IntRange(0, 65535), default=5900, metavar="[PORT]")
def vnc_command(vm: str, port: int) -> None:
    """Let a VNC viewer on this computer show and use a VM's display, until Ctrl-C.

    Only programs on this computer can connect. PORT is 5900, where viewers look first.

    \b
    Examples:
      atoll vnc web
      atoll -H server vnc web 5901
    """
    from atoll.cli.session import perform

    async def action(host: "AsyncHost") -> None:
        found = await host.get(vm)
        # Whether it can be seen is told now, not to the viewer.
        await (await found.vnc()).close()
        async with _listening("127.0.0.1", port, found.vnc):
            click.echo(f"Point a VNC viewer to 127.0.0.1:{port} to see {found.name}.", err=True)
            await asyncio.Event().wait()

    perform(action, cancelled="")


@contextlib.asynccontextmanager
async def _listening(address: str, port: int, open_it: Open) -> AsyncIterator[None]:
    """Serve connections; each leads to one of `open_it`. Raises `AlreadyExists` for a port that is taken."""
    serving: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        serving.add(task)
        try:
            await _joined(reader, writer, open_it)
        except AtollError as error:
            tell(error, settings().format)
        except OSError:
            pass  # The program here has gone.
        finally:
            serving.discard(task)
            writer.close()

    try:
        server = await asyncio.start_server(serve, address, port)
    except OSError as error:
        raise AlreadyExists(
            f"can't listen on {address}:{port}", error.strerror or str(error), "Choose another port."
        ) from error
    try:
        yield
    finally:
        server.close()
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)


async def _joined(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, open_it: Open) -> None:
    """Both directions, each until its side has ended it."""
    there = await open_it()

    async def inward() -> None:
        while data := await there.read():
            writer.write(data)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()

    async def outward() -> None:
        while data := await reader.read(CHUNK):
            await there.write(data)
        await there.end()

    try:
        async with asyncio.TaskGroup() as both:
            both.create_task(inward())
            both.create_task(outward())
    except* AtollError as errors:
        raise errors.exceptions[0] from None
    except* OSError as gone:
        raise ConnectionResetError from gone
    finally:
        await there.close()
