"""Folders of the computer, mounted in a Linux guest: sshfs on a port that the SFTP server is behind."""

from collections.abc import Iterable

from atoll.errors import GuestFailed, Unsupported
from atoll.layout import VmPaths
from atoll.model.spec import ShareSpec
from atoll.operations.guest_agent import exchange
from atoll.operations.guest_capture import collected
from atoll.operations.guest_scripts import PORT
from atoll.operations.guest_slot import SH
from atoll.qemu.guest import ExecStatus

NO_SSHFS, NO_PORT, FAILED = 96, 97, 98

DROP = r"""
kept() { case " $keep " in *" $1 "*) return 0 ;; esac; return 1; }
keep=$*
while read -r source folder rest; do
    case $source in atoll.[0-9]*) ;; *) continue ;; esac
    kept "${source#atoll.}" && continue
    # The kernel writes blanks in octal.
    folder=$(printf '%b' "$folder")
    umount "$folder" && continue
    sync
    umount -l "$folder" && printf '%s\n' "$folder"
done </proc/mounts 2>/dev/null
for run in /run/atoll.share.[0-9]*; do
    case $run in *.log) continue ;; esac
    [ -f "$run" ] && ! kept "${run##*.}" || continue
    read -r pid <"$run"
    i=0
    while read -r name <"/proc/$pid/comm" && [ "$name" = sshfs ]; do
        # One that is busy is left a moment for what it has still to say.
        [ $((i += 1)) -lt 40 ] || kill -9 "$pid"
        sleep 0.02
    done
    rm -f "$run"
done 2>/dev/null
exit 0
"""
"""Unmounts all shares but those with the numbers `$@`, and sees that nobody has their ports open. Tells the folders
that were busy: who has files open there gets errors from then on.
"""

MOUNT = (
    PORT
    + r"""
n=$1 folder=$2 options=$3 run=/run/atoll.share.$1
PATH="${PATH:-/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin}"
command -v sshfs >/dev/null || exit 96
[ -c /dev/fuse ] || modprobe fuse
scope=
# The agent's service may be started anew; what it started otherwise ends with it.
[ -d /run/systemd/system ] && command -v systemd-run >/dev/null && scope='systemd-run --quiet --scope --collect'
mkdir -p "$folder" || exit 98
once() {
    port "org.atoll.share.$n" || return 97
    $scope sshfs -o "$options" host:. "$folder" <>"$p" >&0 2>"$run.log" &
    pid=$! i=0
    echo "$pid" >"$run"
    until grep -q "^atoll\.$n " /proc/mounts; do
        kill -0 "$pid" 2>/dev/null && [ $((i += 1)) -lt 200 ] || return 98
        sleep 0.05
    done
}
tries=0
# A port that has just been plugged may not be there yet, and one of its name that has just gone still be.
until once; do
    code=$?
    [ $((tries += 1)) -lt 60 ] || { tail -n 3 "$run.log" >&2; exit $code; }
    sleep 0.2
done
"""
)
"""Mounts share `$1` at the folder `$2` with the options `$3` of sshfs."""

_CACHED = 1
"""Seconds for which the guest believes what it has read of names, sizes and times."""


def _options(share: ShareSpec) -> str:
    # Everything belongs to the server's user, who is shown as root; that decides what may be done, not the guest.
    wanted = [f"fsname=atoll.{share.number}", "passive", "allow_other", "idmap=user"]
    wanted += ["dir_cache=no", f"attr_timeout={_CACHED}", f"entry_timeout={_CACHED}"]
    return ",".join([*wanted, "ro"] if share.read_only else wanted)


async def drop(paths: VmPaths, name: str, *, keep: Iterable[ShareSpec], timeout: float = 30) -> list[str]:
    """Unmount all but these; returns the folders that were busy. Raises `GuestFailed` when the guest doesn't answer."""
    status = await _run(paths, name, DROP, *(str(share.number) for share in keep), timeout=timeout)
    return status.stdout.decode(errors="replace").splitlines()


async def mount(paths: VmPaths, name: str, share: ShareSpec) -> None:
    """Mount it; its port has a server behind it. Raises `Unsupported`, `GuestFailed`."""
    arguments = (str(share.number), share.guest_path, _options(share))
    status = await _run(paths, name, MOUNT, *arguments, timeout=30)
    code, said = status.code, status.stderr.decode(errors="replace").strip()
    if code == NO_SSHFS:
        raise Unsupported(
            f"{name}: it can't mount {share.guest_path}",
            "sshfs isn't installed in it",
            f"Install it: `atoll exec {name} -- apt-get install -y sshfs`; then `atoll restart {name}`.",
        )
    if code:
        why = said or ("it has no such port" if code == NO_PORT else f"exit code {code}")
        raise GuestFailed(f"{name}: it can't mount {share.guest_path}", why, f"See `atoll share ls {name}`.")


async def _run(paths: VmPaths, name: str, script: str, *arguments: str, timeout: float) -> ExecStatus:
    async with exchange(paths, name, timeout=timeout) as agent:
        pid = await agent.start(SH, ["-c", script, "sh", *arguments], capture=True)
    return await collected(paths, name, pid)
