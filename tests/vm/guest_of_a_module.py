"""A tiny guest that all tests of a module share."""

import contextlib
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from tests.helpers import leftovers
from tests.helpers.machines import Factory, Machine

from atoll.layout import Layout


@contextlib.asynccontextmanager
async def guest_of_a_module() -> AsyncIterator[Machine]:
    folder = Path(tempfile.mkdtemp(prefix="atoll-test-"))
    try:
        async with Factory(Layout(data=folder / "data", cache=folder / "cache", run=folder / "run")) as factory:
            yield await factory.run("tiny", memory="512MiB")
    finally:
        leftovers.end_processes_of(folder)
        shutil.rmtree(folder, ignore_errors=True)
