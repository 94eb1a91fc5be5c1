"""Raw QEMU: the very command line that Atoll starts a VM with, with the same files and sockets, started by hand.

But for what only Atoll has: by hand the network is QEMU's own, in QEMU itself, and nothing confines it.
"""

import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from atoll.layout import Layout
from atoll.model.launch import LaunchPlan
from atoll.operations.boot import make_plan
from atoll.operations.services import Services
from bench.wire import Wire, negotiate

FLAGS = {"read": os.O_RDONLY, "read-write": os.O_RDWR, "append": os.O_WRONLY | os.O_APPEND | os.O_CREAT}


@dataclass(frozen=True)
class ByHand:
    """A VM's command line, and a folder for its sockets."""

    plan: LaunchPlan
    accelerator: str
    sockets: Path
    stream: Path | None = None
    """The memory that it waits for."""
    tap: int | None = None
    """The open tap that its network card has; a user-mode network of QEMU's own otherwise."""

    def socket(self, name: str) -> Path:
        """Where a listening socket of the plan is: `control`, `agent`."""
        return self.sockets / next(Path(each.path).name for each in self.plan.listeners if each.name == name)

    @property
    def argv(self) -> list[str]:
        """The plan's, without its filter of system calls, and with another network."""
        words = list(self.plan.argv)
        if "-sandbox" in words:
            at = words.index("-sandbox")
            del words[at : at + 2]
        for at in [index + 1 for index, word in enumerate(words) if word == "-netdev"]:
            network = {"type": "user"} if self.tap is None else {"type": "tap", "fd": str(self.tap)}
            words[at] = json.dumps({**network, "id": json.loads(words[at])["id"]})
        return words

    def argument(self, option: str) -> str:
        """The word after an option."""
        return self.plan.argv[self.plan.argv.index(option) + 1]


async def by_hand(layout: Layout, name: str, *, sockets: Path) -> ByHand:
    """What Atoll would start that VM with. The VM has been started once, so that its folders are there."""
    services = Services(layout)
    try:
        vm = services.find_vm(name)
        plan, accelerator = await make_plan(services, vm, vm.spec)
    finally:
        services.close()
    return ByHand(plan=plan, accelerator=accelerator, sockets=sockets)


@contextlib.contextmanager
def running(vm: ByHand) -> Iterator[None]:
    """That QEMU, running; killed at the end. Raises `RuntimeError` with its last words when it hangs up."""
    with contextlib.ExitStack() as stack:
        numbers = dict(_opened(vm, stack))
        log = stack.enter_context((vm.sockets / "qemu.log").open("w+b"))
        process = subprocess.Popen(
            [vm.plan.binary, *(_filled(word, numbers) for word in vm.argv)],
            pass_fds=(*numbers.values(), *(() if vm.tap is None else (vm.tap,))),
            cwd=vm.plan.working_folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        try:
            yield
        except ConnectionError as error:
            process.wait(timeout=10)
            log.seek(0)
            raise RuntimeError(f"QEMU ended: {log.read().decode(errors='replace').strip()}") from error
        finally:
            process.kill()
            process.wait()


def _opened(vm: ByHand, stack: contextlib.ExitStack) -> Iterator[tuple[str, int]]:
    for file in vm.plan.files:
        descriptor = os.open(file.path, FLAGS[file.access] | os.O_CLOEXEC, 0o600)
        stack.callback(os.close, descriptor)
        yield file.name, descriptor
    for listener in vm.plan.listeners:
        path = vm.sockets / Path(listener.path).name
        path.unlink(missing_ok=True)
        server = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        server.bind(str(path))
        server.listen()
        yield listener.name, server.fileno()
    for feed in vm.plan.feeds:
        reading, writing = os.pipe()
        stack.callback(os.close, reading)
        os.write(writing, feed.content)
        os.close(writing)
        yield feed.name, reading


def _filled(word: str, numbers: dict[str, int]) -> str:
    for name, number in numbers.items():
        word = word.replace(f"@fd:{name}@", str(number))
    return word


@contextlib.contextmanager
def going(vm: ByHand) -> Iterator[None]:
    """That QEMU with its guest going."""
    with running(vm), Wire(vm.socket("control")) as monitor:
        negotiate(monitor)
        if not monitor.ask("query-status")["running"]:
            monitor.ask("cont")
        yield


def start(vm: ByHand) -> float:
    """Seconds until QMP says that the guest runs."""
    began = time.perf_counter()
    with going(vm):
        return time.perf_counter() - began


def ready(vm: ByHand) -> float:
    """Seconds until the guest's agent answers."""
    began = time.perf_counter()
    # QEMU holds what is sent before the guest has opened its end of the channel, so one question is enough.
    with going(vm), Wire(vm.socket("agent")) as agent:
        agent.ask("guest-ping")
        return time.perf_counter() - began


def resumed(vm: ByHand) -> float:
    """Seconds until a machine that waits for memory has it, and goes on."""
    began = time.perf_counter()
    with running(vm), Wire(vm.socket("control")) as monitor:
        negotiate(monitor)
        monitor.ask("migrate-set-capabilities", capabilities=[{"capability": "mapped-ram", "state": True}])
        monitor.ask("migrate-incoming", uri=f"file:{vm.stream}")
        while monitor.ask("query-migrate").get("status") != "completed":
            pass
        monitor.ask("cont")
        return time.perf_counter() - began
