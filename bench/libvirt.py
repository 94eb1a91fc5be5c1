"""The peer: libvirt by `virsh`, with a domain that has the same devices as Atoll's VM."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

from bench.harness import timed

URI = "qemu:///system"
NAME = "atoll-bench"
MANY = "atoll-bench-many-"
SETTINGS = Path("/etc/libvirt/qemu.conf")
# Where nothing but us starts libvirtd: QEMU as the user that we are, without a security driver.
OWN_SETTINGS = '\n# for a benchmark, taken away at its end\nuser = "root"\ngroup = "root"\nsecurity_driver = "none"\n'


def virsh(*words: str, text: str | None = None) -> str:
    """A virsh command's output. Raises `CalledProcessError`."""
    argv = ["virsh", "--connect", URI, "--quiet", *words]
    stdin = b"" if text is None else text.encode()
    return subprocess.run(argv, check=True, capture_output=True, input=stdin, timeout=600).stdout.decode()


@contextlib.contextmanager
def daemon() -> Iterator[int | None]:
    """A libvirtd that answers: the machine's own, else one of ours that ends with the measurements. Ours has a network
    namespace of its own for its bridge and its dnsmasq; its pid.
    """
    if _answers():
        yield None
        return
    if os.geteuid() != 0:
        raise RuntimeError("libvirtd isn't running and only root can start it: run the benchmark as root")
    kept = SETTINGS.read_bytes() if SETTINGS.exists() else b""
    SETTINGS.write_bytes(kept + OWN_SETTINGS.encode())
    started: list[subprocess.Popen[bytes]] = []
    try:
        for program in ("virtlogd", "libvirtd"):
            path = shutil.which(program) or f"/usr/sbin/{program}"
            alone = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$0"', path]
            started.append(subprocess.Popen(alone, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        # It has no readiness event for who isn't systemd; the sockets appear within a second.
        for _ in range(100):
            if _answers():
                break
            time.sleep(0.1)
        yield started[-1].pid
    finally:
        for process in reversed(started):
            process.terminate()
        for process in reversed(started):
            process.wait(timeout=30)
        SETTINGS.write_bytes(kept)


def _answers() -> bool:
    argv = ["virsh", "--connect", URI, "version"]
    return subprocess.run(argv, check=False, capture_output=True, timeout=60).returncode == 0


@dataclass(frozen=True)
class Domain:
    """A domain with the kernel, memory and kinds of devices of Atoll's VM."""

    kernel: Path
    initrd: Path
    cmdline: str
    disk: Path
    kvm: bool
    network: str = ""
    """A network of libvirt's; a user-mode network of QEMU's otherwise."""

    def define(self) -> None:
        """Make it known to libvirt. Raises `CalledProcessError`."""
        virsh("define", "/dev/stdin", text=self.xml(NAME))

    def xml(self, name: str) -> str:
        """As libvirt.org/formatdomain.html says."""
        source = f"type='network'><source network='{self.network}'/>" if self.network else "type='user'>"
        return f"""<domain type='{"kvm" if self.kvm else "qemu"}'>
  <name>{escape(name)}</name><memory unit='MiB'>512</memory><vcpu>1</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{escape(str(self.kernel))}</kernel><initrd>{escape(str(self.initrd))}</initrd><cmdline>{escape(self.cmdline)}</cmdline></os>
  <features><acpi/><apic/></features>
  <cpu mode='{"host-passthrough" if self.kvm else "maximum"}'/>
  <devices>
    <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file={quoteattr(str(self.disk))}/>
      <target dev='vda' bus='virtio'/><serial>root</serial></disk>
    <interface {source}<model type='virtio'/></interface>
    <serial type='pty'/><memballoon model='virtio' freePageReporting='on'/>
    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
  </devices>
</domain>"""


def start() -> float:
    """Seconds of a whole `virsh start`."""
    try:
        return timed(["virsh", "--connect", URI, "start", NAME])
    finally:
        destroy()


def ready() -> float:
    """Seconds from `virsh start` until the agent answers through libvirt."""
    try:
        with _agent_seen() as wait:
            began = time.perf_counter()
            virsh("start", NAME)
            wait()
            virsh("qemu-agent-command", NAME, '{"execute":"guest-ping"}')
            return time.perf_counter() - began
    finally:
        destroy()


@contextlib.contextmanager
def _agent_seen() -> Iterator[Callable[[], None]]:
    """A function that waits until libvirt tells that the guest's agent has opened its end of the channel."""
    # Without stdbuf virsh keeps what it has to say until it ends.
    event = ["event", "--domain", NAME, "--event", "agent-lifecycle", "--loop", "--timeout", "120"]
    with subprocess.Popen(["stdbuf", "-oL", "virsh", "--connect", URI, *event], stdout=subprocess.PIPE) as listening:
        assert listening.stdout is not None
        lines = listening.stdout

        def wait() -> None:
            if not any(b"state: 'connected'" in line for line in iter(lines.readline, b"")):
                raise RuntimeError("libvirt saw no agent within 120 s")

        try:
            time.sleep(0.3)  # until it listens; it doesn't say so
            yield wait
        finally:
            listening.kill()


@contextlib.contextmanager
def booted() -> Iterator[None]:
    """The domain, up and answering."""
    try:
        with _agent_seen() as wait:
            virsh("start", NAME)
            wait()
        exec_true()  # the first one loads the program
        yield
    finally:
        destroy()


def exec_true() -> float:
    """Seconds of running `true` by virsh: one process that starts it, and others that ask until it has ended."""
    began = time.perf_counter()
    command = {"execute": "guest-exec", "arguments": {"path": "true", "capture-output": True}}
    pid = json.loads(virsh("qemu-agent-command", NAME, json.dumps(command)))["return"]["pid"]
    ask = json.dumps({"execute": "guest-exec-status", "arguments": {"pid": pid}})
    while not json.loads(virsh("qemu-agent-command", NAME, ask))["return"]["exited"]:
        pass
    return time.perf_counter() - began


@contextlib.contextmanager
def touched(script: str) -> Iterator[None]:
    """The domain, up, with its memory filled by a shell script."""
    with booted():
        sh(NAME, script)
        yield


def sh(name: str, script: str) -> str:
    """Run a shell script in a guest to its end; what it says."""
    arguments = {"path": "/bin/sh", "arg": ["-c", script], "capture-output": True}
    command = json.dumps({"execute": "guest-exec", "arguments": arguments})
    pid = json.loads(virsh("qemu-agent-command", name, command))["return"]["pid"]
    ask = json.dumps({"execute": "guest-exec-status", "arguments": {"pid": pid}})
    while not (status := json.loads(virsh("qemu-agent-command", name, ask))["return"])["exited"]:
        time.sleep(0.05)
    if status["exitcode"] != 0:
        raise RuntimeError(json.dumps(status))
    return base64.b64decode(status.get("out-data", "")).decode()


def pause() -> float:
    """Seconds of the guest's longest silence while `virsh snapshot-create-as` keeps its disk and memory."""
    from bench.history import HEARTBEAT, longest_silence

    folder = Path("/var/lib/libvirt/qemu/atoll-bench")
    folder.mkdir(parents=True, exist_ok=True)
    sh(NAME, f"({HEARTBEAT}) > /dev/ttyS0 2>&1 & echo $! > /tmp/heartbeat")
    terminal = os.open(virsh("ttyconsole", NAME).strip(), os.O_RDONLY | os.O_NOCTTY)
    name = f"s{time.monotonic_ns()}"
    memory, overlay = folder / f"{name}.memory", folder / f"{name}.qcow2"
    try:
        return longest_silence(
            lambda size: os.read(terminal, size),
            lambda: virsh(
                "snapshot-create-as", NAME, name, "--live", "--memspec", f"file={memory},snapshot=external",
                "--diskspec", f"vda,snapshot=external,file={overlay}",
            ),
        )  # fmt: skip
    finally:
        os.close(terminal)
        sh(NAME, "kill $(cat /tmp/heartbeat)")
        virsh("snapshot-delete", NAME, name, "--metadata")
        memory.unlink(missing_ok=True)


def restore() -> float:
    """Seconds of a whole `virsh restore`, after a `virsh save`."""
    file = Path("/var/lib/libvirt/qemu/atoll-bench.save")
    virsh("save", NAME, str(file))
    try:
        return timed(["virsh", "--connect", URI, "restore", str(file)])
    finally:
        file.unlink(missing_ok=True)


def list_all() -> float:
    """Seconds of a whole `virsh list --all`."""
    return timed(["virsh", "--connect", URI, "list", "--all"])


def binding_lists(count: int, times: int) -> dict[str, list[float]]:
    """Milliseconds of listing so many domains with their states by libvirt's Python binding."""
    argv = ["/usr/bin/python3", str(Path(__file__).with_name("bindings.py")), URI, MANY, str(times)]
    said = json.loads(subprocess.run(argv, check=True, capture_output=True, timeout=600).stdout)
    if said["count"] != count:
        raise RuntimeError(f"libvirt's binding listed {said['count']} domains instead of {count}")
    took: dict[str, list[float]] = said["took"]
    return took


def fill(count: int, folder: Path, domain: Domain) -> None:
    """That many stopped domains, by one virsh."""
    commands = []
    for index in range(count):
        file = folder / f"{index}.xml"
        file.write_text(domain.xml(f"{MANY}{index}"))
        commands.append(f"define {file}")
    virsh(text="\n".join([*commands, ""]))


def resident_memory() -> float:
    """MiB of the daemons that stay beside a VM."""
    total = 0
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "comm").read_text().strip() in ("libvirtd", "virtlogd", "virtqemud"):
                total += int((process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return total / 2**20


def destroy() -> None:
    """End the domain, if it runs."""
    with contextlib.suppress(subprocess.CalledProcessError):
        virsh("destroy", NAME)


def undefine_all() -> None:
    """Take away every domain of ours."""
    names = [n for n in virsh("list", "--all", "--name").split() if n == NAME or n.startswith(MANY)]
    destroy()
    virsh(text="\n".join([*(f"undefine {name}" for name in names), ""]))
