"""A real QEMU takes each kind of machine that can be asked for, and the BIOS boots from each kind of disk."""

from pathlib import Path
from typing import Any

import pytest
from tests.helpers import image_files
from tests.helpers.images import imported
from tests.helpers.machines import Factory
from tests.helpers.ports import free_port

from atoll.model.requests import DiskRequest
from atoll.model.spec import PortSpec
from atoll.model.state import Phase

pytestmark = pytest.mark.vm


def disks(*buses: str) -> dict[str, Any]:
    """A blank disk on each bus."""
    return {"disks": tuple(DiskRequest(size="64MiB", bus=bus) for bus in buses)}  # type: ignore[arg-type]


PARTS = (
    "firmware",
    "variables",
    "rom",
    "kernel",
    "events",
    "hello",
    "serial-log",
    "seed-iso",
    "control",
    "agent",
    "ram",
)
MACHINES: dict[str, dict[str, Any]] = {
    "one disk": disks("virtio"),
    "a disk on every bus": disks("virtio", "nvme", "sata", "scsi", "floppy"),
    "as many as sata and floppy take": disks(*["sata"] * 6, *["floppy"] * 2),
    "many disks on scsi": disks(*["scsi"] * 40),
    "as many as there are slots": disks(*["virtio", "nvme"] * 9),
    "disks that are called like parts of the machine": {
        "firmware": "uefi",
        "disks": tuple(DiskRequest(name=name, size="1MiB") for name in PARTS),
    },
    "no disk, but firmware": {"firmware": "bios"},
    "uefi": {"firmware": "uefi", **disks("virtio", "sata")},
    "cds": {"cdrom": ("cd", "cd"), **disks("scsi")},
    "a floppy that is an image": {"image": "floppy"},
    "images as further disks": {
        "disks": (DiskRequest(image="cd", bus="scsi"), DiskRequest(image="floppy", bus="virtio"))
    },
    "no display": {"display": "none", **disks("virtio")},
    "a virtio display": {"display": "virtio", **disks("virtio")},
    "an old network card": {"nic_model": "e1000", **disks("virtio")},
    "another network card": {"nic_model": "e1000e", "mac": "52:54:00:12:34:56", **disks("virtio")},
    "no network": {"network": "none", **disks("virtio")},
    "a network without a way out": {"restrict_network": True, **disks("virtio")},
    "a topology": {"cpus": 4, "max_cpus": 8, "sockets": 2, "threads": 2, **disks("virtio")},
    "many cpus": {"cpus": 1, "max_cpus": 288, **disks("virtio")},
    "a cpu model": {"cpu_model": "Nehalem", **disks("virtio")},
    "an odd amount of memory": {"memory": "77MB", **disks("virtio")},
    "little memory": {"memory": "16MiB", **disks("virtio")},
    "microvm": {"machine": "microvm", **disks("virtio", "nvme", "sata", "scsi")},
    "microvm with a display": {"machine": "microvm", "display": "virtio", **disks("virtio")},
    "arm64": {"arch": "aarch64", **disks("virtio", "nvme", "scsi", "sata")},
    "arm64 with a display of another kind": {"arch": "aarch64", "display": "vga", "cpus": 2, **disks("virtio")},
    "arm64 with a cd": {"arch": "aarch64", "cdrom": ("cd",), "nic_model": "e1000e"},
    "riscv64": {"arch": "riscv64", "firmware": "bios", **disks("virtio", "nvme", "scsi", "sata")},
    "riscv64 with a display": {"arch": "riscv64", "firmware": "bios", "display": "vga", **disks("virtio")},
}


@pytest.mark.parametrize("options", MACHINES.values(), ids=MACHINES.keys())
async def test_qemu_takes_it(factory: Factory, options: dict[str, Any], tmp_path: Path) -> None:
    for kind in ("iso", "floppy"):
        file = tmp_path / f"{kind}.img"
        file.write_bytes(image_files.EVERY_KIND[kind])
        await imported(file, factory.layout, "cd" if kind == "iso" else kind)
    port = PortSpec(host_port=free_port(), guest_port=80)
    wanted = {"memory": "64MiB", "image": None, **options}
    if wanted.get("network") != "none":
        wanted["ports"] = (port,)
    vm = factory.machine(await factory.host.create(wanted.pop("image"), name="v", **wanted))
    await vm.start()
    assert await vm.phase() is Phase.RUNNING
    await vm.stop(force=True)
    assert await vm.phase() is Phase.STOPPED


def says_hello(length: int) -> bytes:
    """A disk whose boot sector writes a greeting to the first serial line."""
    # xor ax,ax; mov ds,ax; mov dx,0x3f8; mov si,0x7c15; next: lodsb; test al,al; jz end; out dx,al; jmp next; end: hlt
    code = bytes.fromhex("31c0 8ed8 baf803 be157c ac 84c0 7403 ee ebf8 f4 ebfd")
    sector = (code + b"hello from a boot sector\r\n\0").ljust(510, b"\0") + b"\x55\xaa"
    return sector.ljust(length, b"\0")


@pytest.mark.parametrize("bus", [None, "virtio", "nvme", "sata", "scsi"])
async def test_the_bios_boots_from_it(factory: Factory, bus: str | None, tmp_path: Path) -> None:
    file = tmp_path / "disk.img"
    file.write_bytes(says_hello(1440 * 1024 if bus is None else 1 << 20))
    image = await imported(file, factory.layout, "hello")
    # A blank disk is there too; the image's comes first.
    blank = (DiskRequest(size="1MiB", bus="virtio"),)
    options = {} if bus is None else {"disk_bus": bus}
    vm = factory.machine(await factory.host.create(image, name="v", memory="64MiB", disks=blank, **options))
    (first, _) = vm.record.spec.disks
    assert first.bus == (bus or "floppy")
    await vm.start()
    assert await vm.wait(text="hello from a boot sector", timeout=60)
