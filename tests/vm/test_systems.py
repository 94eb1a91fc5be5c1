"""Systems of many kinds run side by side on one computer, and each is known by what it says or shows."""

import asyncio
import json
import re
import subprocess
import zlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.machines import Factory, Machine

from atoll.host import process
from atoll.model.requests import ImportRequest
from atoll.model.state import Phase

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]

PATIENCE = 300.0
"""Seconds for any of them to say something while eight share two processors."""
MEMTEST = Path("/usr/lib/memtest86+/memtest86+x64.iso")
MEMTEST_BLUE = (0, 0, 168)
U_BOOT = Path("/usr/lib/u-boot/qemu-riscv64_smode/uboot.elf")
GRUB = Path("/usr/lib/grub/i386-pc")
GRUB_SETTINGS = "serial --unit=0 --speed=115200\nterminal_input serial at_keyboard\nterminal_output serial console\n"
GRUB_MODULES = ("biosdisk", "serial", "terminal", "at_keyboard", "echo", "normal", "minicmd")


def run(program: str, *words: str | Path) -> None:
    subprocess.run([process.find(program), *words], check=True, capture_output=True)


def grub_disk(folder: Path) -> Path:
    """A disk with nothing on it but GRUB: its boot sector reads the core that begins in the next sector."""
    settings, core, disk = folder / "grub.cfg", folder / "core.img", folder / "grub.raw"
    settings.write_text(GRUB_SETTINGS)
    run("grub-mkimage", "-O", "i386-pc", "-p", "/boot/grub", "-c", settings, "-o", core, *GRUB_MODULES)
    image = (GRUB / "boot.img").read_bytes() + core.read_bytes()
    disk.write_bytes(image.ljust(1 << 20, b"\0"))
    return disk


def shell_disk(folder: Path) -> Path:
    """A FAT disk with a script that the UEFI shell runs when it starts."""
    script, disk = folder / "startup.nsh", folder / "shell.raw"
    script.write_bytes(b"echo the script of the UEFI shell ran\r\n")
    with disk.open("wb") as file:
        file.truncate(4 << 20)
    run("mkfs.vfat", "-F", "12", disk)
    run("mcopy", "-i", disk, script, "::startup.nsh")
    return disk


def pixels(png: bytes) -> list[tuple[int, int, int]]:
    """The pixels of a PNG with eight bits a colour and no palette (RFC 2083, sections 3 and 6)."""
    offset, header, packed = 8, b"", b""
    while offset < len(png):
        length, kind = int.from_bytes(png[offset : offset + 4], "big"), png[offset + 4 : offset + 8]
        content = png[offset + 8 : offset + 8 + length]
        header, packed = (content, packed) if kind == b"IHDR" else (header, packed + content * (kind == b"IDAT"))
        offset += length + 12
    width = int.from_bytes(header[:4], "big")
    assert header[8:10] == b"\x08\x02", "it isn't RGB with eight bits a colour"
    data, stride = zlib.decompress(packed), width * 3
    above, found = bytes(stride), []
    for start in range(0, len(data), stride + 1):
        above = unfiltered(data[start], data[start + 1 : start + 1 + stride], above)
        found += [(above[i], above[i + 1], above[i + 2]) for i in range(0, stride, 3)]
    return found


def unfiltered(kind: int, line: bytes, above: bytes) -> bytes:
    """One line of a PNG before it was filtered."""
    out = bytearray(line)
    for i, value in enumerate(line):
        left, up, corner = (out[i - 3] if i >= 3 else 0), above[i], (above[i - 3] if i >= 3 else 0)
        guess = left + up - corner
        paeth = min((left, up, corner), key=lambda near, guess=guess: abs(guess - near))  # type: ignore[misc]
        out[i] = (value + (0, left, up, (left + up) // 2, paeth)[kind]) & 0xFF
    return bytes(out)


async def answers(vm: Machine, command: str, expected: str) -> None:
    """Type a command on the serial line, as someone at a console, and read until the answer stands on its own line."""
    console = await vm.console()
    try:
        await console.write(command.encode() + b"\r")
        seen = b""
        async with asyncio.timeout(PATIENCE):
            while not re.search(rb"[\r\n]" + expected.encode() + rb"\s", seen):
                seen += await console.read()
    finally:
        await console.close()


async def is_release(vm: Machine, version: str) -> None:
    await vm.wait("ready", timeout=PATIENCE)
    assert f'VERSION_ID="{version}"' in await vm.read("/etc/os-release")
    assert await vm.sh("hostname") == vm.name


async def is_tiny(vm: Machine, architecture: str) -> None:
    await vm.wait("ready", timeout=PATIENCE)
    assert await vm.sh("uname -sm") == f"Linux {architecture}"


async def is_memtest(vm: Machine) -> None:
    """It has no agent and says nothing on its serial line: there is a screen, and a keyboard."""
    async with asyncio.timeout(PATIENCE):
        while not await asyncio.to_thread(is_mostly, MEMTEST_BLUE, await vm.screenshot()):
            await asyncio.sleep(2)  # a screen tells nobody when it changes
        restarts = resets_of(vm)
        waiting = asyncio.ensure_future(anext(restarts))
        while not waiting.done():
            # "Exit" at the bottom of its screen, which is there before the keyboard is.
            await vm.key("esc")
            await asyncio.wait([waiting], timeout=10)
        await waiting


def is_mostly(colour: tuple[int, int, int], png: bytes) -> bool:
    seen = pixels(png)
    return seen.count(colour) > len(seen) / 2


async def resets_of(vm: Machine) -> Any:
    """Each reset that the guest asked for, from QEMU's own event log."""
    rest = b""
    async for chunk in vm.logs(follow=True, source="events"):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            event = json.loads(line)
            if event.get("event") == "RESET" and event["data"]["guest"]:
                yield event


async def is_grub(vm: Machine) -> None:
    await vm.wait(text="grub>", timeout=PATIENCE)
    await vm.type("echo typed on the keyboard: $grub_platform\n")
    await vm.wait(text="typed on the keyboard: pc", timeout=PATIENCE)
    await answers(vm, "echo by wire: $grub_cpu", "by wire: i386")


async def is_uefi_shell(vm: Machine) -> None:
    await vm.wait(text=r"[\r\n]the script of the UEFI shell ran", timeout=PATIENCE)
    await vm.type("echo typed: level %uefishellsupport%\n")
    await vm.wait(text="typed: level 3", timeout=PATIENCE)


async def is_u_boot(vm: Machine) -> None:
    await vm.wait(text="Hit any key", timeout=PATIENCE)
    await answers(vm, "", "=>")
    await answers(vm, "echo board $board on $arch", "board qemu-riscv on riscv")


async def checked(vm: Machine, check: "Check") -> None:
    """What has no operating system polls its keyboard without end: halt it, and the others get on sooner."""
    await check(vm)
    if not vm.record.spec.guest.agent:
        await vm.pause()


Check = Callable[[Machine], Awaitable[None]]


async def imported(factory: Factory, path: Path, name: str, **options: Any) -> str:
    return (await factory.host.images.import_file(ImportRequest(path=str(path), name=name, **options))).name


@pytest.mark.parametrize("releases", [(), pytest.param(("12", "13"), marks=pytest.mark.slow)], ids=["6", "8"])
async def test_systems_of_many_kinds_run_at_the_same_time(
    factory: Factory, tmp_path: Path, releases: tuple[str, ...]
) -> None:
    memtest = await imported(factory, MEMTEST, "memtest")
    grub = await imported(factory, grub_disk(tmp_path), "grub", format="raw")
    uefi_shell = await imported(factory, shell_disk(tmp_path), "uefi-shell", format="raw", firmware="uefi")
    u_boot = await imported(factory, U_BOOT, "u-boot", arch="riscv64")
    systems: list[tuple[str, str, Check]] = [
        (await factory.image("tiny"), "192MiB", lambda vm: is_tiny(vm, "x86_64")),
        (await factory.image("tiny@aarch64"), "192MiB", lambda vm: is_tiny(vm, "aarch64")),
        (memtest, "64MiB", is_memtest),
        (grub, "64MiB", is_grub),
        (uefi_shell, "256MiB", is_uefi_shell),
        (u_boot, "128MiB", is_u_boot),
    ]
    for version in releases:
        debian = await factory.image(f"debian:{version}")
        systems.append((debian, "512MiB", lambda vm, version=version: is_release(vm, version)))  # type: ignore[misc]
    machines = []
    for image, memory, _ in systems:
        name = image.removesuffix(":latest").replace(":", "-")
        machines.append(factory.machine(await factory.host.create(image, name=name, memory=memory)))
    for vm in machines:
        await vm.start()
    async with asyncio.TaskGroup() as checks:
        for vm, (_, _, check) in zip(machines, systems, strict=True):
            checks.create_task(checked(vm, check))
    for vm in machines:
        if await vm.phase() is Phase.PAUSED:
            await vm.resume()
    assert [info.phase for info in await factory.host.ls()] == [Phase.RUNNING] * len(systems)
