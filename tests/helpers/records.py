"""Records for tests: one of each kind with all that matters, small ones, and a look past Atoll into the file."""

import contextlib
import sqlite3
from pathlib import Path

from msgspec.structs import replace

from atoll.model.image import Image, ImageDisk, Layer
from atoll.model.operation import Operation, Owner, StepRecord
from atoll.model.snapshot import Memory, Snapshot
from atoll.model.spec import BootSpec, CpuSpec, DiskSpec, GuestSpec, NicSpec, PortSpec, SeedSpec, VmSpec
from atoll.model.units import GIB
from atoll.model.vm import Exit, Run, Vm
from atoll.store.sqlite import SqliteRecords

LAYER = Layer(id="base", virtual_size=GIB, file_size=4096, sha256="d" * 64)
IMAGE = Image(
    id="1" * 32,
    name="debian:13",
    arch="x86_64",
    created_at=1000.5,
    source="build",
    sha256="e" * 64,
    disks=(ImageDisk(name="root", size=GIB, layer="base"),),
    firmwares=("kernel", "uefi"),
    firmware="kernel",
    kernel="a" * 64,
    cmdline="quiet",
    guest=GuestSpec(agent=True, seed="nocloud"),
    tags=("debian:latest",),
    labels={"recipe": "debian:13"},
)
SPEC = VmSpec(
    machine_type="pc-q35-10.0",
    cpu=CpuSpec(count=2, maximum=4),
    boot=BootSpec(firmware="kernel", kernel="a" * 64, cmdline="quiet"),
    disks=(DiskSpec(name="root", size=GIB, layer="base"), DiskSpec(name="cd0", size=1, blob="f" * 64, media="cdrom")),
    nics=(NicSpec(name="net0", mac="52:54:00:00:00:01", ports=(PortSpec(host_port=8080, guest_port=80),)),),
    seed=SeedSpec(user="me", ssh_keys=("ssh-ed25519 AAAA",)),
    addresses={"disk-root": "0x3"},
)
WEB = Vm(
    id="2" * 32,
    name="web",
    image="debian:13",
    created_at=2000.25,
    spec=SPEC,
    pending=replace(SPEC, memory=2 * GIB),
    run=Run(
        pid=7, start_time=9, boot_id="boot", started_at=2001, accelerator="tcg", qemu_version="10.0.2", start_count=3
    ),
    last_exit=Exit(at=1999, reason="guest-shutdown", detail="the guest powered itself off", last_lines="bye\n日本"),
    seeded=True,
    labels={"team": "größe 🐧"},
    remove_when_stopped=True,
)
OPERATION = Operation(
    id="3" * 32,
    verb="stop",
    subject=WEB.id,
    subject_name="web",
    request={"vm_id": WEB.id, "timeout": 1.5},
    state="stuck",
    owner=Owner(pid=7, start_time=9, boot_id="boot"),
    created_at=2002,
    steps=(StepRecord(name="ask", state="done"), StepRecord(name="wait", state="undo-failed", error="no answer")),
    notes={"asked": ["agent"]},
    error="no answer",
    cancel_requested=True,
)


def opened(path: Path) -> "contextlib.closing[SqliteRecords]":
    return contextlib.closing(SqliteRecords(path))


def vm(name: str, *ports: PortSpec | int) -> Vm:
    """A small VM; its id is its name."""
    specs = tuple(p if isinstance(p, PortSpec) else PortSpec(host_port=p, guest_port=80) for p in ports)
    nic = NicSpec(name="net0", mac="52:54:00:00:00:01", ports=specs)
    return Vm(id=name, name=name, image="", created_at=0, spec=VmSpec(nics=(nic,)))


def image(name: str, *tags: str) -> Image:
    return Image(id=f"id-{name}", name=name, tags=tags, arch="x86_64", created_at=0, source="", sha256="")


def operation(number: int, state: str = "done") -> Operation:
    return replace(
        OPERATION, id=f"{number:032x}", created_at=float(number), state=state, notes={}, cancel_requested=False
    )


def sql(path: Path, statement: str, *values: object) -> list[tuple[object, ...]]:
    """Change or read the file without Atoll."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        return db.execute(statement, values).fetchall()


SNAPSHOT = Snapshot(
    id="5" * 32,
    name="clean",
    vm_id=WEB.id,
    vm_name="web",
    image=WEB.image,
    created_at=1_700_000_100.0,
    spec=WEB.spec,
    message="before 'all' that",
    memory=Memory(id="6" * 32, file_size=4096, accelerator="tcg"),
    seeded=True,
)


def put_everything(records: SqliteRecords) -> None:
    records.add_image(IMAGE, [LAYER])
    records.add_vm(WEB)
    records.put_snapshot(SNAPSHOT)
    records.put_operation(OPERATION)
    records.add_event("vm.created", vm_id=WEB.id, name="web", data={"image": "debian:13"})
