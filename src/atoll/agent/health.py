"""`/metrics`, `/healthz`, `/readyz`: for those who watch the agent."""

import asyncio
import contextlib
import os

from litestar import Response, get
from litestar.handlers import HTTPRouteHandler
from msgspec import Struct

from atoll.agent.exposition import TYPE
from atoll.agent.handlers import Agent
from atoll.agent.metrics import scrape
from atoll.agent.problems import PROBLEM_TYPE, problem_of
from atoll.errors import AtollError, StorageFailed, from_os_error
from atoll.host import facts
from atoll.layout import Layout
from atoll.model.task import Problem

LEAST_DISK = 16 << 20
"""Bytes that have to be free."""


class Health(Struct, frozen=True):
    status: str


def health_handlers(agent: Agent) -> list[HTTPRouteHandler]:
    """What is asked again and again."""

    @get("/metrics", tags=["host"], operation_id="agent_metrics", opt={"scope": "read"})
    async def metrics() -> Response[str]:
        """All figures, as Prometheus reads them."""
        agent.scraped()
        vms = await agent.host.ls()
        text = await scrape(vms, agent.host.services, agent.meter, tasks=agent.tasks.running())
        return Response(text, headers={"Content-Type": TYPE})

    @get("/healthz", tags=["host"], operation_id="agent_health", opt={"scope": "public"})
    async def healthz() -> Health:
        """The agent answers."""
        return Health("ok")

    @get("/readyz", tags=["host"], operation_id="agent_ready", opt={"scope": "public"})
    async def readyz() -> Response[Health | Problem]:
        """The agent can do its work: records can be read and written, and the disk isn't full."""
        try:
            agent.host.services.records.last_event()
            await asyncio.to_thread(_check_disk, agent.host.layout)
        except AtollError as error:
            problem = problem_of(error)
            return Response(problem, status_code=503, media_type=PROBLEM_TYPE)
        return Response(Health("ready"), status_code=200)

    return [metrics, healthz, readyz]


def _check_disk(layout: Layout) -> None:
    """Raises `StorageFailed`."""
    if (free := facts.free_disk(layout.data)) < LEAST_DISK:
        raise StorageFailed(
            f"the disk of {layout.data} is full", f"{free} bytes are free", "Free some space (`atoll prune`)."
        )
    tried = layout.data / f".ready-{os.getpid()}"
    try:
        tried.write_bytes(b"ready")
    except OSError as error:
        raise from_os_error(error, f"write {tried}") from error
    finally:
        with contextlib.suppress(OSError):
            tried.unlink(missing_ok=True)
