"""Built images boot under a QEMU command line written by hand, and do what their record says."""

import asyncio
import base64
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.images import built, cached_layout

from atoll.errors import BuildFailed
from atoll.host import process
from atoll.images.seed import hash_password, write_seed
from atoll.images.tiny import build_tiny
from atoll.layout import Layout
from atoll.model.image import Image
from atoll.model.spec import SeedSpec
from atoll.model.units import GIB, MIB

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]

MACHINES = {
    "x86_64": ["qemu-system-x86_64", "-M", "q35,sata=off,smbus=off", "-cpu", "max"],
    "aarch64": ["qemu-system-aarch64", "-M", "virt", "-cpu", "max"],
    "riscv64": ["qemu-system-riscv64", "-M", "virt"],
}
PATIENCE = 180.0
"""Seconds for a boot on a busy machine; an idle one takes 2 to 13."""


@dataclass
class Guest:
    """A running guest, asked by its agent."""

    process: asyncio.subprocess.Process
    agent: Path
    monitor: Path
    serial: Path
    seconds: float = 0.0
    _lines: dict[str, Any] = field(default_factory=dict)

    async def _ask(self, command: str, timeout: float, **arguments: Any) -> Any:
        reader, writer = await asyncio.open_unix_connection(self.agent, limit=1 << 26)
        try:
            number = secrets.randbits(31)
            for request in ({"execute": "guest-sync-delimited", "arguments": {"id": number}}, {"execute": command}):
                if arguments and request["execute"] == command:
                    request["arguments"] = arguments
                writer.write(json.dumps(request).encode() + b"\n")
            async with asyncio.timeout(timeout):
                # Whatever came before our own number belongs to an earlier question.
                synchronised: Any = None
                while synchronised != {"return": number}:
                    await reader.readuntil(b"\xff")
                    synchronised = json.loads(await reader.readline())
                reply = json.loads(await reader.readline())
            assert "error" not in reply, reply
            return reply["return"]
        finally:
            writer.close()

    async def wait_for_agent(self) -> None:
        start = time.monotonic()
        while not self.agent.exists():
            await asyncio.sleep(0.01)
        answered = False
        while not answered:
            # Asked again now and then: an agent that ends takes the question with it, and QEMU binds its socket
            # some moments before it listens there.
            with contextlib.suppress(TimeoutError, asyncio.IncompleteReadError, ConnectionRefusedError):
                await self._ask("guest-ping", 15)
                answered = True
            if self.process.returncode is not None:
                pytest.fail(f"QEMU ended with {self.process.returncode}")
            if not answered and time.monotonic() - start > PATIENCE:
                pytest.fail(f"the guest didn't answer; it said: {self.serial.read_text(errors='replace')[-2000:]}")
            await asyncio.sleep(0.01)
        self.seconds = time.monotonic() - start

    async def sh(self, script: str) -> str:
        options = {"path": "/bin/sh", "arg": ["-c", script], "capture-output": True}
        pid = (await self._ask("guest-exec", 60, **options))["pid"]
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            status = await self._ask("guest-exec-status", 60, pid=pid)
            if status["exited"]:
                out = base64.b64decode(status.get("out-data", "")) + base64.b64decode(status.get("err-data", ""))
                return out.decode(errors="replace").strip()
            await asyncio.sleep(0.02)
        raise AssertionError(f"this didn't end in the guest: {script}")

    async def until(self, script: str, expected: str, seconds: float = 60) -> None:
        """Wait until the script's output has `expected` in it."""
        deadline, said = time.monotonic() + seconds, ""
        while expected not in said:
            assert time.monotonic() < deadline, f"{script}: still {said!r}"
            said = await self.sh(script)

    async def command(self, name: str, /, **arguments: Any) -> None:
        """A QMP command."""
        reader, writer = await asyncio.open_unix_connection(self.monitor)
        try:
            await reader.readline()
            for execute, given in (("qmp_capabilities", {}), (name, arguments)):
                writer.write(json.dumps({"execute": execute, "arguments": given}).encode() + b"\n")
                while "event" in (reply := json.loads(await reader.readline())):
                    pass
                assert "return" in reply, reply
        finally:
            writer.close()

    @contextlib.asynccontextmanager
    async def until_event(self, name: str) -> AsyncIterator[None]:
        """Ends when QEMU has told of an event that what is done inside brings about."""
        reader, writer = await asyncio.open_unix_connection(self.monitor)
        try:
            await reader.readline()
            writer.write(b'{"execute": "qmp_capabilities"}\n')
            await reader.readline()
            yield
            async with asyncio.timeout(PATIENCE):
                while json.loads(await reader.readline()).get("event") != name:
                    pass
        finally:
            writer.close()

    async def shut_down(self, mode: str = "powerdown") -> None:
        """Tell the agent to; it gives no answer to this."""
        _, writer = await asyncio.open_unix_connection(self.agent)
        writer.write(json.dumps({"execute": "guest-shutdown", "arguments": {"mode": mode}}).encode() + b"\n")
        await writer.drain()
        writer.close()

    async def ended(self) -> None:
        async with asyncio.timeout(60):
            assert await self.process.wait() == 0


@contextlib.asynccontextmanager
async def started(
    image: Image, layout: Layout, folder: Path, *, firmware: str = "kernel", size: int = 0, more: tuple[str, ...] = ()
) -> AsyncIterator[Guest]:
    """Boot the image on a head in `folder`, which lasts from one boot to the next."""
    head, guest_size = folder / "root.qcow2", size or image.disks[0].size
    if not head.exists():
        layer = layout.layer(str(image.disks[0].layer))
        await process.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", "-b", layer, "-F", "qcow2", head, str(guest_size)]
        )
    for name in ("agent", "monitor"):
        (folder / name).unlink(missing_ok=True)
    argv = [
        *MACHINES[image.arch], "-accel", "tcg", "-m", str((image.memory or GIB) // MIB),
        "-nodefaults", "-display", "none",
        "-serial", f"file:{folder}/serial", "-qmp", f"unix:{folder}/monitor,server=on,wait=off",
        "-drive", f"if=none,id=root,file={head},format=qcow2", "-device", "virtio-blk-pci,drive=root,serial=root",
        "-device", "virtio-rng-pci", "-device", "pcie-root-port,id=hot,chassis=1",
        "-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile=",
        "-device", "virtio-serial-pci,id=ports", "-chardev", f"socket,id=agent,path={folder}/agent,server=on,wait=off",
        "-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0", *more,
    ]  # fmt: skip
    if firmware == "kernel":
        argv += ["-kernel", str(layout.blob(str(image.kernel))), "-initrd", str(layout.blob(str(image.initrd)))]
        argv += ["-append", f"{image.cmdline} systemd.hostname=web-1"]
    started_process = await asyncio.create_subprocess_exec(*argv)
    guest = Guest(started_process, folder / "agent", folder / "monitor", folder / "serial")
    try:
        await guest.wait_for_agent()
        yield guest
    finally:
        if started_process.returncode is None:
            started_process.kill()
            await started_process.wait()


async def built_or_skip(recipe: str) -> tuple[Image, Layout]:
    try:
        return await built(recipe)
    except BuildFailed as error:
        if "package lists of" in error.what:
            pytest.skip(f"the mirror of this machine doesn't serve it now: {error.why}")
        raise


@pytest.mark.parametrize("arch", ["x86_64", "aarch64", pytest.param("riscv64", marks=pytest.mark.slow)])
async def test_tiny_boots_and_keeps_what_was_written(arch: str, tmp_path: Path) -> None:
    image, layout = await built_or_skip("tiny" if arch == "x86_64" else f"tiny@{arch}")
    assert image.arch == arch and image.guest.agent
    async with started(image, layout, tmp_path) as guest:
        assert await guest.sh("hostname") == "web-1"
        assert (await guest.sh("uname -r")).endswith(("-amd64", "-arm64", "-riscv64"))
        await guest.until("ip -4 addr; ip route; cat /etc/resolv.conf", "nameserver 10.0.2.3")
        assert "10.0.2.15" in await guest.sh("ip -4 addr show eth0")
        await guest.sh("echo precious >/root/kept && sync")
        await guest.shut_down()
        await guest.ended()
    async with started(image, layout, tmp_path) as guest:
        assert await guest.sh("cat /root/kept") == "precious"
    assert "root@web-1:" in (tmp_path / "serial").read_text(errors="replace"), "a shell waits on the serial line"


async def test_tiny_turns_off_at_its_power_button(tmp_path: Path) -> None:
    image, layout = await built("tiny")
    async with started(image, layout, tmp_path) as guest:
        await guest.until("ps", "acpid")
        await guest.command("system_powerdown")
        await guest.ended()


async def test_tiny_grows_with_its_disk_and_reboots_when_told(tmp_path: Path) -> None:
    image, layout = await built("tiny")
    async with started(image, layout, tmp_path, size=3 * GIB) as guest:
        await guest.until("df -m / | awk 'NR==2 && $2 > 2900 {print \"grown\"}'", "grown")
        boot = await guest.sh("cat /proc/sys/kernel/random/boot_id")
        async with guest.until_event("RESET"):
            await guest.shut_down("reboot")
        await guest.wait_for_agent()
        assert await guest.sh("cat /proc/sys/kernel/random/boot_id") != boot


async def test_tiny_sees_disks_and_ports_that_come_later(tmp_path: Path) -> None:
    image, layout = await built("tiny")
    (tmp_path / "data").write_bytes(b"plugged".ljust(MIB, b"\0"))
    async with started(image, layout, tmp_path) as guest:
        await guest.until("ps", "uevent")
        await guest.command(
            "blockdev-add",
            **{"driver": "raw", "node-name": "d", "file": {"driver": "file", "filename": f"{tmp_path}/data"}},
        )
        await guest.command("device_add", driver="virtio-blk-pci", drive="d", bus="hot", serial="data", id="disk-data")
        await guest.until("head -c 7 /dev/vdb", "plugged")
        await guest.command("chardev-add", id="late", backend={"type": "null", "data": {}})
        await guest.command(
            "device_add", driver="virtserialport", chardev="late", name="late.0", id="port", bus="ports.0"
        )
        await guest.until("ls /dev/virtio-ports", "late.0")
        await guest.command("device_del", id="port")
        await guest.until("ls /dev/virtio-ports/late.0", "No such file")


async def test_tiny_has_what_commands_from_outside_need(tmp_path: Path) -> None:
    image, layout = await built("tiny")
    terminals = ("-device", "virtconsole,chardev=tty,name=tty0", "-chardev", "null,id=tty")
    async with started(image, layout, tmp_path, more=terminals) as guest:
        assert await guest.sh("test -c /dev/hvc0 && echo yes") == "yes"
        assert await guest.sh("su user -c 'id -un; pwd' ") == "user\n/"
        wanted = "tar setsid stty su env nc wget httpd sha256sum dd base64 setpriv"
        missing = f"for each in {wanted}; do command -v $each >/dev/null || echo $each; done"
        assert await guest.sh(missing) == ""
        assert await guest.sh("find / -xdev ! -user root | grep -v ^/home/user") == ""
        agent = "pidof qemu-ga"
        before = await guest.sh(agent)
        await guest.sh(f"setsid sh -c 'sleep 0.2; kill -9 {before}' >/dev/null 2>&1 &")
        await asyncio.sleep(0.5)
        await guest.wait_for_agent()
        assert await guest.sh(agent) not in ("", before), "the agent comes back"


async def test_the_same_packages_give_the_same_image(tmp_path: Path) -> None:
    steps: list[str] = []

    async def build(name: str) -> tuple[str, set[str]]:
        (tmp_path / name).mkdir()
        made = await build_tiny(
            layout=cached_layout(), folder=tmp_path / name, arch="x86_64", name="tiny:latest",
            report=lambda progress: steps.append(progress.step),
        )  # fmt: skip
        return made.image.sha256, {path.name for path in (tmp_path / name).iterdir()}

    (one, files), (two, _) = await asyncio.gather(build("one"), build("two"))
    assert one == two
    assert files == {"kernel", "initrd", "root.qcow2"}, "nothing but the image is left"
    assert {"download packages", "make the disk"} <= set(steps)


@pytest.mark.slow
@pytest.mark.parametrize("release", ["12", "13"])
async def test_debian_boots_directly_without_a_seed(release: str, tmp_path: Path) -> None:
    image, layout = await built(f"debian:{release}")
    async with started(image, layout, tmp_path, size=12 * GIB) as guest:
        assert f'VERSION_ID="{release}"' in await guest.sh("cat /etc/os-release")
        assert await guest.sh("hostname") == "web-1"
        await guest.until("systemctl is-system-running", "running", PATIENCE)
        assert "disabled" in await guest.sh("cloud-init status")
        assert "10.0.2.15" in await guest.sh("ip -4 addr")
        await guest.until("df -BG --output=size / | tail -1", "12G")
        passwords = await guest.sh("cut -d: -f2 /etc/shadow | sort -u")
        assert not any(line.startswith("$") for line in passwords.splitlines()) and "" not in passwords.splitlines()
        assert await guest.sh("ls /etc/ssh | grep host_") == "", "host keys are made at the first connection"
        assert "apt" in await guest.sh("apt-get --version")
        await guest.command("system_powerdown")
        await guest.ended()


@pytest.mark.slow
@pytest.mark.parametrize("release", ["12", "13"])
async def test_debian_boots_by_uefi_and_takes_a_seed(release: str, tmp_path: Path) -> None:
    image, layout = await built(f"debian:{release}")
    assert image.firmwares == ("kernel", "uefi")
    seed = SeedSpec(user="bob", password_hash=await hash_password("secret"))
    write_seed(tmp_path / "seed.iso", seed=seed, hostname="seeded", instance_id="one", install_agent=False)
    (tmp_path / "vars.fd").write_bytes(Path("/usr/share/OVMF/OVMF_VARS_4M.fd").read_bytes())
    more = (
        "-drive", "if=pflash,unit=0,readonly=on,format=raw,file=/usr/share/OVMF/OVMF_CODE_4M.fd",
        "-drive", f"if=pflash,unit=1,format=raw,file={tmp_path}/vars.fd",
        "-drive", f"if=none,id=seed,format=raw,readonly=on,file={tmp_path}/seed.iso",
        "-device", "virtio-blk-pci,drive=seed,serial=seed",
    )  # fmt: skip
    async with started(image, layout, tmp_path, firmware="uefi", more=more) as guest:
        assert "yes" in await guest.sh("test -d /sys/firmware/efi && echo yes")
        await guest.until("cloud-init status", "done", PATIENCE * 2)
        assert await guest.sh("hostname") == "seeded"
        assert "NOPASSWD: ALL" in await guest.sh("sudo -l -U bob")
        assert await guest.sh("getent shadow bob | cut -d: -f2") == seed.password_hash
