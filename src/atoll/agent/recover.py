"""Operations of commands that were killed: finished or undone as soon as the command is dead."""

import asyncio
import contextlib
from collections.abc import Callable

from atoll.host import facts
from atoll.host.watch import Watches, wait_for_exit
from atoll.model.operation import Owner
from atoll.operations.journal import this_process
from atoll.operations.recovery import recover
from atoll.operations.registry import VERBS
from atoll.operations.services import Services

Tell = Callable[[str], None]
MISHAP_DELAY = 5.0
"""Seconds from something that went wrong to the next try."""
PAUSE = 0.05
"""Seconds in which what is written to the journal is looked at once."""


async def recover_as_found(services: Services, *, tell: Tell) -> None:
    """Until cancelled. The journal is looked at when it is written to, and when the owner of an operation ends."""
    owners: dict[Owner, asyncio.Task[None]] = {}
    told: set[str] = set()
    ours = this_process()
    watches = Watches()
    try:
        # Every write to the records goes to this file; it is there as long as they are open.
        watches.add(services.layout.database.with_name(f"{services.layout.database.name}-wal"), "journal")
        watches.wake()
        async for _ in watches.changes():
            for sentence in await recover(services, VERBS):
                # What this version can't settle would be told again at each look.
                if sentence not in told:
                    told.add(sentence)
                    tell(sentence)
            alive = {
                operation.owner
                for operation in services.records.operations(unfinished=True)
                if operation.state != "stuck" and operation.owner != ours and facts.is_alive(operation.owner)
            }
            for owner in owners.keys() - alive:
                owners.pop(owner).cancel()
            for owner in alive - owners.keys():
                owners[owner] = asyncio.create_task(_wake_at_its_end(owner, watches))
            await asyncio.sleep(PAUSE)
    finally:
        for task in owners.values():
            task.cancel()
        await asyncio.gather(*owners.values(), return_exceptions=True)
        watches.close()


async def _wake_at_its_end(owner: Owner, watches: Watches) -> None:
    with contextlib.suppress(OSError):
        await wait_for_exit(owner.pid)
    watches.wake()
