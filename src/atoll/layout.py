"""Every path, socket and file name on disk, and nothing else.

For a user the XDG directories are used, for root `/var/lib/atoll`, `/var/cache/atoll` and `/run/atoll`. `ATOLL_HOME`
puts everything under one folder. Nothing here touches the disk.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from atoll.errors import InvalidInput
from atoll.model.spec import DiskSpec

SHARED_MEMORY = Path("/dev/shm")
"""A file system in memory that every Linux has, with as much room as half of it."""


@dataclass(frozen=True)
class VmPaths:
    """The files of one VM: `home` outlives a reboot, `run` has sockets and locks."""

    home: Path
    run: Path

    def head(self, disk: DiskSpec) -> Path:
        """The writable head of one disk. A new head has another name, so that both can be there for a moment."""
        return self.home / f"{disk.name}.{disk.head[:8]}.qcow2"

    @property
    def nvram(self) -> Path:
        """The UEFI variables of this VM."""
        return self.home / "nvram.fd"

    @property
    def seed(self) -> Path:
        """The first-boot seed (a NoCloud ISO)."""
        return self.home / "seed.iso"

    @property
    def unsettled(self) -> Path:
        """What its guest is to be told as soon as somebody speaks with its agent."""
        return self.home / "unsettled.json"

    @property
    def logs(self) -> Path:
        return self.home / "log"

    @property
    def serial_log(self) -> Path:
        """What the guest wrote to its first serial line."""
        return self.logs / "serial.log"

    @property
    def qemu_log(self) -> Path:
        """QEMU's standard error."""
        return self.logs / "qemu.log"

    @property
    def event_log(self) -> Path:
        """QMP events, written by QEMU itself: the evidence of how it ended when nobody of ours was there."""
        return self.logs / "events.jsonl"

    @property
    def command_line(self) -> Path:
        """QEMU's command line of the last start, for people; never read back."""
        return self.logs / "command.txt"

    def socket(self, name: str) -> Path:
        """A listening socket handed to QEMU: `control`, `observe`, `agent`, `serial`, or a stream port."""
        return self.run / f"{name}.sock"

    def network_link(self, nic: str) -> Path:
        """Where the helper of a user-mode network waits for its one connection."""
        return self.network_folder(nic) / "link"

    def network_control(self, nic: str) -> Path:
        """Where that helper publishes ports."""
        return self.network_folder(nic) / "control"

    def network_folder(self, nic: str) -> Path:
        """Where that helper works; nobody else does."""
        return self.run / f"{nic}.net"

    def share(self, number: int) -> Path:
        """The process that serves a folder, once the guest has it mounted."""
        return self.run / f"share{number}.json"

    @property
    def share_log(self) -> Path:
        """What those that serve folders said."""
        return self.logs / "shares.log"

    def lock(self, name: str) -> Path:
        """A lock file for `flock`: an agent exchange or a stream slot."""
        return self.run / f"{name}.lock"


@dataclass(frozen=True)
class NetworkPaths:
    """The files of a network that is up. All of them can be made again."""

    run: Path

    @property
    def holder(self) -> Path:
        """Who holds the namespace: a process's identity."""
        return self.run / "holder.json"

    @property
    def alive(self) -> Path:
        """A pipe that the holder has open: the uplink ends when it has gone."""
        return self.run / "alive"

    @property
    def links(self) -> Path:
        """What `ip -batch` is given at first."""
        return self.run / "links"

    @property
    def rules(self) -> Path:
        """What nft is given at first."""
        return self.run / "rules.nft"

    @property
    def names(self) -> Path:
        """What dnsmasq reads, and nothing else: it sees this folder."""
        return self.run / "names"

    @property
    def dns(self) -> Path:
        return self.names / "dns.conf"

    @property
    def dhcp(self) -> Path:
        return self.names / "dhcp.conf"

    @property
    def hosts(self) -> Path:
        """Names and addresses, for dnsmasq's DNS."""
        return self.names / "hosts"

    @property
    def leases(self) -> Path:
        """Cards and addresses, for dnsmasq's DHCP."""
        return self.names / "leases"

    @property
    def impairments(self) -> Path:
        """What cables do wrong, until the network goes down."""
        return self.run / "impairments.json"

    @property
    def resolver(self) -> Path:
        """The /etc/resolv.conf of programs that run in it."""
        return self.run / "resolv.conf"

    @property
    def name_switch(self) -> Path:
        """Their /etc/nsswitch.conf."""
        return self.run / "nsswitch.conf"

    @property
    def policy(self) -> Path:
        """What the rules that hold were made from."""
        return self.run / "policy.json"

    @property
    def uplink(self) -> Path:
        """The socket that takes published ports, in a folder of the uplink's own. By its name the uplink is found."""
        return self.run / "uplink" / self.run.name

    @property
    def log(self) -> Path:
        """What the holder, dnsmasq and the uplink said."""
        return self.run / "log"


@dataclass(frozen=True)
class TransferPaths:
    """The files of an upload, or of a bundle that waits to be downloaded."""

    folder: Path

    @property
    def content(self) -> Path:
        return self.folder / "content"

    @property
    def about(self) -> Path:
        """What was announced."""
        return self.folder / "about.json"


@dataclass(frozen=True)
class Layout:
    """Where this Atoll keeps its things."""

    data: Path
    cache: Path
    run: Path

    @property
    def database(self) -> Path:
        return self.data / "atoll.db"

    @property
    def reserve(self) -> Path:
        """Room on the disk that the records get when there is no other."""
        return self.data / "reserve"

    @property
    def layers(self) -> Path:
        """Frozen disk layers, mode 0444, named `{id}.qcow2`."""
        return self.data / "layers"

    def layer(self, layer_id: str) -> Path:
        return self.layers / f"{layer_id}.qcow2"

    @property
    def blobs(self) -> Path:
        """Frozen plain files (kernels, initial RAM disks, ISO images), mode 0444, named by their SHA-256."""
        return self.data / "blobs"

    def blob(self, sha256: str) -> Path:
        return self.blobs / sha256

    @property
    def memory(self) -> Path:
        """Memory of snapshots and of suspended VMs: sparse files, mode 0444, named by their ids."""
        return self.data / "memory"

    def memory_file(self, memory_id: str) -> Path:
        return self.memory / memory_id

    @property
    def templates(self) -> Path:
        """Memory that several machines have mapped: in the computer's memory, and gone when it restarts."""
        digest = hashlib.sha256(os.fsencode(self.data)).hexdigest()[:16]
        return SHARED_MEMORY / f"atoll-{digest}"

    @property
    def temporary(self) -> Path:
        """Unfinished files, on the same file system as layers and blobs so that a rename is enough."""
        return self.data / "tmp"

    def transfer(self, kind: str, transfer_id: str) -> TransferPaths:
        """An `upload` or a `bundle`."""
        return TransferPaths(folder=self.temporary / f"{kind}-{transfer_id}")

    @property
    def catalogue(self) -> Path:
        """The user's additions to the list of images that can be pulled, and other addresses for its publishers."""
        return self.data / "catalogue.yaml"

    @property
    def vms(self) -> Path:
        return self.data / "vms"

    def vm(self, vm_id: str) -> VmPaths:
        return VmPaths(home=self.vms / vm_id, run=self.run / "vms" / vm_id)

    def network(self, network_id: str) -> NetworkPaths:
        return NetworkPaths(run=self.run / "networks" / network_id)

    @property
    def locks(self) -> Path:
        return self.run / "locks"

    def vm_lock(self, vm_id: str) -> Path:
        """Held (flock) by whoever drives the VM: a command, or the agent."""
        return self.locks / f"{vm_id}.lock"

    def named_lock(self, name: str) -> Path:
        """A lock for a thing that isn't a VM: an image build, the recovery."""
        return self.locks / f"{name}.lock"

    @property
    def capabilities(self) -> Path:
        """What each QEMU binary said that it can do."""
        return self.cache / "capabilities"

    @property
    def accelerator(self) -> Path:
        """The proof, or the refusal, of each accelerator."""
        return self.cache / "accelerator.json"

    @property
    def empty_disks(self) -> Path:
        """A blank disk of each size that was asked for, to be copied."""
        return self.cache / "empty"

    @property
    def downloads(self) -> Path:
        """Partial and finished downloads, resumable."""
        return self.cache / "downloads"

    @property
    def packages(self) -> Path:
        """Distribution packages that images are built from."""
        return self.cache / "packages"

    @property
    def agent_socket(self) -> Path:
        """Where this computer's agent listens for local commands, if one runs."""
        return self.run / "agent.sock"

    @property
    def agent_state(self) -> Path:
        """What the agent knows that records don't: requests by their keys, and how far it has read engines' logs."""
        return self.data / "agent.db"

    @property
    def booted(self) -> Path:
        """The boot of this computer for which the agent has started what is to be started."""
        return self.run / "booted"

    @property
    def page_merging(self) -> Path:
        """How the kernel merged pages before the agent made it do so."""
        return self.run / "page-merging.json"

    @property
    def credentials(self) -> Path:
        """The agent's certificate authority and certificate, and the tokens of who may use it from elsewhere."""
        return self.data / "agent"

    @property
    def server_certificate(self) -> Path:
        """The agent's certificate with its key."""
        return self.credentials / "server.pem"

    @property
    def tokens(self) -> Path:
        return self.credentials / "tokens.json"

    @property
    def audit(self) -> Path:
        """Who asked the agent for what; older ones are `audit.jsonl.1` …."""
        return self.data / "audit.jsonl"

    @property
    def refused(self) -> Path:
        """The part of that which strangers can fill: requests of who showed nothing good."""
        return self.data / "refused.jsonl"

    @property
    def wake(self) -> Path:
        """A file that is touched after each recorded event, so that followers can wait with inotify."""
        return self.run / "wake"


def find(environment: dict[str, str] | None = None, user_id: int | None = None) -> Layout:
    """The layout for this user: `ATOLL_HOME`, else root's directories, else the XDG directories. Raises `InvalidInput`.

    A user's sockets and locks are beside the data, not in the session's runtime directory: that differs between a
    login, `su` and cron, and goes at the last logout, while VMs run on (docs/decisions/004-sockets-stay-at-logout.md).
    """
    env = dict(os.environ) if environment is None else environment
    uid = os.getuid() if user_id is None else user_id
    if home := env.get("ATOLL_HOME"):
        root = _expanded(home)
        return Layout(data=root / "data", cache=root / "cache", run=root / "run")
    if uid == 0:
        return Layout(data=Path("/var/lib/atoll"), cache=Path("/var/cache/atoll"), run=Path("/run/atoll"))
    data, cache = _xdg(env, "XDG_DATA_HOME", ".local/share") / "atoll", _xdg(env, "XDG_CACHE_HOME", ".cache") / "atoll"
    return Layout(data=data, cache=cache, run=data / "run")


def find_remotes(environment: dict[str, str] | None = None) -> Path:
    """Where this user's other computers are noted, with the tokens for them. Root's are a user's like any other's."""
    env = dict(os.environ) if environment is None else environment
    home = env.get("ATOLL_HOME")
    folder = _expanded(home) / "config" if home else _xdg(env, "XDG_CONFIG_HOME", ".config") / "atoll"
    return folder / "hosts.json"


def _xdg(env: dict[str, str], variable: str, default: str) -> Path:
    """A base directory. The specification says that a path that isn't absolute counts for none."""
    for path in (Path(env.get(variable, "")), Path(env.get("HOME", "")) / default):
        if path.is_absolute():
            return path
    return _expanded("~") / default


def _expanded(path: str) -> Path:
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError as error:
        raise InvalidInput(
            f"{path} is no folder", "this user, or the one that it names, has no home", "Set ATOLL_HOME to a full path."
        ) from error
