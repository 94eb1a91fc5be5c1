"""An agent in a process of its own, as `atoll serve` is."""

import asyncio
import contextlib
import os
import signal
import ssl
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from atoll.layout import Layout
from tests.helpers.command import ATOLL
from tests.helpers.ports import free_port

READY = 30.0
"""Seconds for an agent to listen, on a busy machine."""


class Served:
    """A running agent."""

    def __init__(self, process: asyncio.subprocess.Process, layout: Layout) -> None:
        self.process = process
        self.layout = layout

    @property
    def pid(self) -> int:
        return self.process.pid

    async def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal, and wait for the end; the exit code."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)
        return await asyncio.wait_for(self.process.wait(), 90)


@contextlib.asynccontextmanager
async def remote_agent(layout: Layout, *options: str) -> AsyncIterator[str]:
    """An agent that others reach, at the URL that this gives."""
    port = free_port()
    async with agent(layout, "--listen", f"127.0.0.1:{port}", *options):
        yield f"https://127.0.0.1:{port}"


def trusting(layout: Layout, *, certificate: Path | None = None) -> ssl.SSLContext:
    """What a client of this home's agent has: its authority, and perhaps a certificate of its own."""
    context = ssl.create_default_context(cafile=str(layout.credentials / "ca.pem"))
    if certificate is not None:
        context.load_cert_chain(certificate)
    return context


@contextlib.asynccontextmanager
async def agent(layout: Layout, *options: str) -> AsyncIterator[Served]:
    """`atoll serve` for a home, ready; ended at the end."""
    environment = os.environ | {"ATOLL_HOME": str(layout.data.parent)}
    process = await asyncio.create_subprocess_exec(
        *ATOLL, "serve", *options, env=environment, stderr=asyncio.subprocess.PIPE
    )
    assert process.stderr is not None
    served = Served(process, layout)
    try:
        said = b""
        async with asyncio.timeout(READY):
            while f"listening on {layout.agent_socket}".encode() not in said:
                line = await process.stderr.readline()
                assert line, f"the agent ended: {said.decode()}"
                said += line
        passing_on = asyncio.create_task(_pass_on(process.stderr))
        yield served
        passing_on.cancel()
    finally:
        if process.returncode is None:
            await served.end()


async def _pass_on(stream: asyncio.StreamReader) -> None:
    """Its log is the test's."""
    while line := await stream.readline():
        sys.stderr.buffer.write(line)
        sys.stderr.flush()
