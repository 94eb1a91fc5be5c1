"""What is done with the SDK, in a process of its own: `python -m bench.sdk fill COUNT`, or `exec VM SOCKET COUNT`.

The home is the one that ATOLL_HOME names.
"""

import asyncio
import json
import sys
import time
from pathlib import Path

import atoll
from bench.wire import Wire, exec_true

AT_ONCE = 4


async def fill(count: int) -> None:
    """Stopped VMs `many-0`, `many-1` …, a few at a time."""
    async with atoll.connect_async() as host:
        places = asyncio.Semaphore(AT_ONCE)

        async def create(index: int) -> None:
            async with places:
                await host.create("tiny", name=f"many-{index}")

        async with asyncio.TaskGroup() as group:
            for index in range(count):
                group.create_task(create(index))


async def execs(name: str, socket: Path, count: int) -> dict[str, list[float]]:
    """Milliseconds of each `exec` with the connection open, and of the agent's own exchange in another guest."""
    values: dict[str, list[float]] = {"atoll": [], "raw": []}
    async with atoll.connect_async() as host:
        vm = await host.get(name)
        with Wire(socket) as agent:
            agent.ask("guest-ping")
            for repetition in range(count + 1):
                began = time.perf_counter()
                result = await vm.exec(["true"])
                took = {"atoll": time.perf_counter() - began, "raw": exec_true(agent)}
                if result.exit_code != 0:
                    raise RuntimeError(f"true ended with {result.exit_code}")
                if repetition:  # the first one loads the program
                    for side, seconds in took.items():
                        values[side].append(1000 * seconds)
    return values


def main() -> None:
    """Do what the arguments say."""
    match sys.argv[1:]:
        case ["fill", count]:
            asyncio.run(fill(int(count)))
        case ["exec", name, socket, count]:
            print(json.dumps(asyncio.run(execs(name, Path(socket), int(count)))))
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
