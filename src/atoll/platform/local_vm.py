"""A handle to a VM of this machine."""

import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from msgspec.structs import replace

from atoll.errors import InvalidInput, NotFound, Unsupported
from atoll.model import names
from atoll.model.backup import Backup
from atoll.model.difference import Difference
from atoll.model.requests import (
    CaptureRequest,
    DiskRequest,
    ImpairRequest,
    NicRequest,
    NicSetRequest,
    SetRequest,
    ShareRequest,
)
from atoll.model.snapshot import HistoryNode, Snapshot
from atoll.model.spec import DiskSpec, NicSpec, PortSpec
from atoll.model.state import require
from atoll.model.vm import Change, ExecRequest, ExecResult, ShareInfo, Stats, Vm, VmInfo
from atoll.operations.services import Services
from atoll.platform.api import AsyncVm, BundleFile, ByteSink, Connection, Drain, Report, Terminal
from atoll.platform.copies import AsyncCopies
from atoll.platform.held import held, held_terminal

if TYPE_CHECKING:
    from atoll.operations.guest_copy import Execute
    from atoll.operations.uses import Use

# Operations are imported where they are used, so that a command pays only for what it does.


class LocalVm:
    """A VM of this machine. See `platform/api.py` for what each method does."""

    def __init__(self, services: Services, vm: Vm) -> None:
        self._services = services
        self._id = vm.id
        self._name = vm.name

    def __repr__(self) -> str:
        return f"<Vm {self._name} {self._id[: names.SHORT_ID]}>"

    @property
    def id(self) -> str:
        return self._id

    @property
    def name(self) -> str:
        return self._name

    def _record(self) -> Vm:
        vm = self._services.vm(self._id)
        self._name = vm.name
        return vm

    def _running(self) -> Vm:
        """The record of a VM that has to run. Raises `WrongState`."""
        from atoll.operations import observe

        vm = self._record()
        require(vm.name, observe.phase_of(self._services, vm), "exec")
        return vm

    def _with_agent(self) -> Vm:
        vm = self._running()
        if not vm.spec.guest.agent:
            raise Unsupported(
                f"{vm.name}: its image has no guest agent",
                next_step=f"Use `atoll console {vm.name}`; or install one there, then `atoll set {vm.name} --agent`.",
            )
        return vm

    @contextlib.asynccontextmanager
    async def awake(self, report: Report | None = None) -> AsyncIterator[Vm]:
        """The record of a VM that is wanted now. It is in use within; one that slept by itself goes on."""
        use = await self._used(report)
        try:
            yield self._record()
        finally:
            use.close()

    async def _used(self, report: Report | None = None) -> "Use":
        """The same, until the use is closed."""
        from atoll.operations import uses

        use = await uses.begin(self._services.layout, self._record().id)
        try:
            if (vm := self._record()).sleeps:
                from atoll.operations.wake import wake

                await wake(vm, services=self._services, by="command", report=report)
            return use
        except BaseException:
            use.close()
            raise

    async def info(self) -> VmInfo:
        from atoll.operations import observe

        vm = self._record()
        stands_on = observe.place_of(self._services, vm)
        info = replace(observe.observe_one(self._services, vm), stands_on=stands_on)
        if not vm.spec.shares and vm.pending is None:
            return info
        from atoll.operations.shares import infos

        return replace(info, shares=infos(info.vm, info.phase, self._services.layout.vm(vm.id)))

    async def start(self, *, wait: bool = False, timeout: float | None = None) -> None:
        from atoll.operations.start import start

        await start(self._record(), services=self._services)
        if wait:
            await self.wait("ready", timeout=timeout)

    async def stop(self, *, force: bool = False, timeout: float = 60.0) -> None:
        from atoll.operations.stop import stop

        await stop(self._record(), services=self._services, force=force, timeout=timeout)
        await self._remove_if_throwaway()

    async def _remove_if_throwaway(self) -> None:
        with contextlib.suppress(NotFound):
            if self._record().remove_when_stopped:
                await self.rm()

    async def restart(self, *, force: bool = False, timeout: float = 60.0) -> None:
        from atoll.operations.start import start
        from atoll.operations.stop import stop

        await stop(self._record(), services=self._services, force=force, timeout=timeout)
        await start(self._record(), services=self._services)

    async def pause(self) -> None:
        from atoll.operations.power import pause

        async with self.awake() as vm:
            await pause(vm, services=self._services)

    async def suspend(self, *, report: Report | None = None) -> None:
        from atoll.operations.suspend import suspend

        await suspend(self._record(), services=self._services, report=report)

    async def resume(self) -> None:
        from atoll.operations.power import resume

        if self._record().suspended is not None:
            await self.start()
            return
        await resume(self._record(), services=self._services)

    async def rm(self, *, force: bool = False) -> int:
        from atoll.operations.remove import remove

        return await remove(self._record(), services=self._services, force=force)

    async def rename(self, name: str) -> None:
        from atoll.operations.rename import rename

        await rename(self._record(), name, services=self._services)
        self._name = name

    async def set(self, request: SetRequest) -> list[Change]:
        from atoll.operations.configure import configure

        return await configure(self._record(), request, services=self._services)

    async def wait(
        self,
        condition: Literal["ready", "stopped"] | None = None,
        *,
        text: str | None = None,
        timeout: float | None = None,
    ) -> str:
        from atoll.operations.ready import wait

        if condition == "stopped" and text is None:
            return await wait(self._record(), condition, services=self._services, timeout=timeout)
        async with self.awake() as vm:
            said = await wait(vm, condition, services=self._services, text=text, timeout=timeout)
            if said == "ready":
                await self._mount_again()
            return said

    async def _mount_again(self) -> None:
        """A guest that has rebooted by itself lacks its shared folders until somebody turns to it."""
        if self._record().spec.shares:
            from atoll.operations.share import mount_each

            await mount_each(self._services, [self._record()])

    async def exec(
        self,
        command: Sequence[str] | ExecRequest,
        *,
        stdin: bytes | AsyncIterator[bytes] | None = None,
        on_stdout: ByteSink | None = None,
        on_stderr: ByteSink | None = None,
        drain: Drain | None = None,
    ) -> ExecResult:
        """`drain` is awaited after each piece of output, and the guest waits meanwhile."""
        from atoll.operations.guest_exec import execute

        request = command if isinstance(command, ExecRequest) else ExecRequest(argv=tuple(command))
        if not request.argv:
            raise InvalidInput("there is no command to run", next_step="Write it after `--`.")
        async with self.awake():
            vm = self._with_agent()
            await self._mount_again()
            paths = self._services.layout.vm(vm.id)
            return await execute(
                paths, vm.name, request, stdin=stdin, on_stdout=on_stdout, on_stderr=on_stderr, drain=drain
            )

    async def shell(self, command: Sequence[str] = (), *, user: str | None = None) -> Terminal:
        from atoll.operations.guest_shell import open_shell

        async def opened() -> Terminal:
            vm = self._with_agent()
            return await open_shell(self._services.layout.vm(vm.id), vm.name, command=tuple(command), user=user)

        return await held_terminal(await self._used(), opened)

    async def console(self) -> Terminal:
        from atoll.operations import observe
        from atoll.operations.guest_shell import open_console

        async def opened() -> Terminal:
            vm = self._record()
            require(vm.name, observe.phase_of(self._services, vm), "console")
            return await open_console(self._services.layout.vm(vm.id), vm.name)

        return await held_terminal(await self._used(), opened)

    async def connect(self, port: int) -> Connection:
        from atoll.operations.reach import open_port

        return await held(await self._used(), lambda: open_port(self._record(), port, services=self._services))

    async def vnc(self) -> Connection:
        from atoll.operations.reach import open_display

        return await held(await self._used(), lambda: open_display(self._record(), services=self._services))

    async def copy_to(self, source: Path, destination: str, *, report: Report | None = None) -> None:
        from atoll.operations.guest_copy import copy_to

        async with self.awake(report):
            await copy_to(self._in_guest(), self._name, source, destination, report=report)

    async def copy_from(self, source: str, destination: Path, *, report: Report | None = None) -> None:
        from atoll.operations.guest_copy import copy_from

        async with self.awake(report):
            await copy_from(self._in_guest(), self._name, source, destination, report=report)

    def _in_guest(self) -> "Execute":
        """What runs a command in it."""
        from atoll.operations.guest_exec import execute

        vm = self._with_agent()
        return partial(execute, self._services.layout.vm(vm.id), vm.name)

    def logs(
        self,
        *,
        follow: bool = False,
        tail: int | None = None,
        source: Literal["serial", "qemu", "events"] = "serial",
    ) -> AsyncIterator[bytes]:
        from atoll.operations.logs import read

        return read(self._record(), services=self._services, follow_it=follow, tail=tail, source=source)

    async def screenshot(self) -> bytes:
        from atoll.operations.look import screenshot

        async with self.awake() as vm:
            return await screenshot(vm, services=self._services)

    async def type(self, text: str) -> None:
        from atoll.operations.look import type_text

        async with self.awake() as vm:
            await type_text(vm, text, services=self._services)

    async def key(self, *keys: str) -> None:
        from atoll.operations.look import press

        async with self.awake() as vm:
            await press(vm, keys, services=self._services)

    async def ports(self) -> list[PortSpec]:
        return [port for nic in self._record().spec.nics for port in nic.ports]

    async def publish(self, port: PortSpec) -> PortSpec:
        from atoll.operations.ports import publish

        return await publish(self._record(), port, services=self._services)

    async def unpublish(self, host_port: int, *, protocol: Literal["tcp", "udp"] = "tcp") -> None:
        from atoll.operations.ports import unpublish

        await unpublish(self._record(), host_port, services=self._services, protocol=protocol)

    async def stats(self) -> Stats:
        from atoll.operations.look import stats

        return await stats(self._record(), services=self._services)

    async def disks(self) -> list[DiskSpec]:
        vm = self._record()
        return list((vm.pending or vm.spec).disks)

    async def disk_add(self, request: DiskRequest) -> tuple[DiskSpec, Change]:
        from atoll.operations.disk import add_disk

        async with self.awake() as vm:
            return await add_disk(vm, request, services=self._services)

    async def disk_rm(self, name: str) -> Change:
        from atoll.operations.disk import remove_disk

        async with self.awake() as vm:
            return await remove_disk(vm, name, services=self._services)

    async def disk_resize(self, name: str, size: str | int) -> Change:
        from atoll.operations.disk import resize_disk

        async with self.awake() as vm:
            return await resize_disk(vm, name, size, services=self._services)

    async def shares(self) -> list[ShareInfo]:
        return list((await self.info()).shares)

    async def share_add(self, request: ShareRequest) -> ShareInfo:
        from atoll.operations.share import add

        async with self.awake() as vm:
            made = await add(vm, request, services=self._services)
        return next(each for each in await self.shares() if each.guest_path == made.guest_path)

    async def share_rm(self, guest_path: str) -> Change:
        from atoll.operations.share import remove

        async with self.awake() as vm:
            return await remove(vm, guest_path, services=self._services)

    async def net_attach(self, request: NicRequest | str) -> tuple[NicSpec, Change]:
        from atoll.operations.network_nics import attach

        wanted = NicRequest(network=request) if isinstance(request, str) else request
        async with self.awake() as vm:
            return await attach(vm, wanted, services=self._services)

    async def net_set(self, request: NicSetRequest) -> list[Change]:
        from atoll.operations.network_groups import set_card

        return await set_card(self._record(), request, services=self._services)

    async def net_detach(self, network: str) -> Change:
        from atoll.operations.network_nics import detach
        from atoll.operations.networks import find_network

        async with self.awake() as vm:
            return await detach(vm, find_network(self._services, network), services=self._services)

    async def net_impair(self, request: ImpairRequest) -> None:
        from atoll.operations.network_impair import impair

        async with self.awake() as vm:
            await impair(vm, request, services=self._services)

    def net_capture(
        self, request: CaptureRequest | None = None, *, on_lost: Callable[[int], None] | None = None
    ) -> AsyncIterator[bytes]:
        return self._captured(request or CaptureRequest(), on_lost)

    async def _captured(self, request: CaptureRequest, on_lost: Callable[[int], None] | None) -> AsyncIterator[bytes]:
        from atoll.operations.network_capture import capture

        async with self.awake() as vm:
            frames = capture(vm, request, services=self._services, on_lost=on_lost)
            async with contextlib.aclosing(frames):  # type: ignore[type-var]  # it is a generator
                async for each in frames:
                    yield each

    async def snapshot(
        self,
        name: str | None = None,
        *,
        message: str = "",
        disk_only: bool = False,
        quiesce: bool = False,
        report: Report | None = None,
    ) -> Snapshot:
        from atoll.operations.snapshot import SnapshotOptions, snapshot

        options = SnapshotOptions(name=name, message=message, disk_only=disk_only, quiesce=quiesce)
        async with self.awake(report) as vm:
            return await snapshot(vm, options, services=self._services, report=report)

    async def history(self) -> list[HistoryNode]:
        from atoll.operations.history import history

        return history(self._record(), services=self._services)

    async def restore(
        self, snapshot: str, *, keep: bool = False, disk_only: bool = False, report: Report | None = None
    ) -> None:
        from atoll.operations.restore import find_snapshot, restore

        node = find_snapshot(self._services, self._record(), snapshot)
        if keep:
            await self.snapshot(report=report)
        await restore(self._record(), node, services=self._services, report=report, disk_only=disk_only)

    async def forget(self, snapshot: str) -> None:
        from atoll.operations.history import forget
        from atoll.operations.restore import find_snapshot

        vm = self._record()
        await forget(vm, find_snapshot(self._services, vm, snapshot), services=self._services)

    async def diff(self, snapshot: str, *, report: Report | None = None) -> Difference:
        from atoll.operations.diff import diff

        name = self._record().name
        return await diff(f"{name}@{snapshot}", name, services=self._services, report=report)

    async def fork(self, count: int = 1, *, name: str | None = None, report: Report | None = None) -> AsyncCopies:
        from atoll.operations.fork import fork

        async with self.awake(report) as vm:
            made = await fork(vm, count, name, services=self._services, report=report)
        return AsyncCopies(LocalVm(self._services, vm) for vm in made)

    async def clone(self, name: str | None = None, *, full: bool = False, report: Report | None = None) -> "LocalVm":
        from atoll.operations.clone import clone

        async with self.awake(report) as vm:
            made = await clone(vm, name, services=self._services, full=full, report=report)
        return LocalVm(self._services, made)

    async def backup(
        self, to: str | Path, *, message: str = "", quiesce: bool = False, report: Report | None = None
    ) -> Backup:
        from atoll.operations.backup import backup

        async with self.awake(report) as vm:
            return await backup(vm, to, services=self._services, message=message, quiesce=quiesce, report=report)

    async def export(
        self,
        path: BundleFile,
        *,
        snapshot: str | None = None,
        base: str | None = None,
        disk_only: bool = False,
        report: Report | None = None,
    ) -> None:
        from atoll.model.bundle import ExportOptions
        from atoll.operations.export import export
        from atoll.operations.restore import find_snapshot

        options = ExportOptions(base=base, disk_only=disk_only)
        if snapshot is not None:
            node = find_snapshot(self._services, self._record(), snapshot)
            await export(node, path, options, services=self._services, report=report)
            return
        async with self.awake(report) as vm:
            await export(vm, path, options, services=self._services, report=report)


_: type[AsyncVm] = LocalVm
