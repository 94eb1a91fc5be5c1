"""What Atoll runs in a Linux guest, in the language that busybox's ash, dash and bash share.

A stream slot K of a guest has three virtio-serial ports: `org.atoll.in.K`, `.out.K` and `.err.K`. A port has one opener
at a time, so a command can't have it as its output: `> /dev/stderr` would fail, and a process left in the background
would keep the port. Hence a *relay* per slot and output: `cat o m o m … > port`, where `o` is a FIFO and `m` a file
that holds a mark. It costs nothing while it waits; a command writes into the FIFO; and when the last writer has gone,
the mark tells the host so. If it doesn't come after the command's end, something was left in the background: then the
relay is replaced, and what goes on in the background writes to nowhere.
"""

from collections.abc import Sequence

from atoll.errors import InvalidInput
from atoll.model.vm import ExecRequest

USES = 120
"""How many commands a relay may serve: fewer than the 128 times that its FIFO is named on its command line."""

NO_PORTS = 98
"""The exit code of `RELAY` in a guest that hasn't got the ports."""

# Finds a port by its name: udev and our images make the links, other guests have only sysfs.
PORT = """
port() {
    if [ -c "/dev/virtio-ports/$1" ]; then p=/dev/virtio-ports/$1; return; fi
    for n in /sys/class/virtio-ports/*/name; do
        read -r name <"$n" || continue
        if [ "$name" = "$1" ]; then n=${n%/name}; p=/dev/${n##*/}; return; fi
    done 2>/dev/null
    return 1
}
"""

RELAY = (
    PORT
    + """
umask 077
d=/run/atoll.$1
port "org.atoll.in.$1" && in=$p && port "org.atoll.out.$1" && out=$p && port "org.atoll.err.$1" && err=$p || exit 98
if [ -d "$d" ]; then
    # Leftovers keep a reader, so that they aren't ended by SIGPIPE; it ends with them.
    for f in o e; do
        [ -p "$d/$f" ] || continue
        exec 9<>"$d/$f" 8<"$d/$f" 9>&-
        cat <&8 >/dev/null 2>&1 &
        exec 8<&-
    done
    read -r old <"$d/pids" && kill -9 $old
    for f in /proc/[0-9]*/fd/[01]; do
        for q in "$in" "$out" "$err"; do
            if [ "$f" -ef "$q" ]; then x=${f#/proc/}; kill -9 "${x%%/*}"; old="$old ${x%%/*}"; fi
        done
    done
    i=0
    for x in $old; do
        while kill -0 "$x" && [ $((i += 1)) -lt 20000 ]; do :; done
    done
    rm -rf "$d"
fi 2>/dev/null
mkdir "$d" && cd "$d" && mkfifo -m 666 o e && printf '\\036%s\\036' "$2" >m || exit 97
o='o m' e='e m'
for i in 1 2 3 4 5 6 7; do o="$o $o" e="$e $e"; done
exec 4>"$out" 5>"$err" || exit 97
cat m $o </dev/null >&4 4>&- 5>&- & pids="$$ $!"
cat m $e </dev/null >&5 4>&- 5>&- & pids="$pids $!"
exec 4>&- 5>&-
echo "$pids" >pids
wait
cd / && read -r now <"$d/pids" && [ "$now" = "$pids" ] && rm -rf "$d"
"""
)
"""Starts the relays of slot `$1` with the mark `$2` in place of those that were there; ends when they do."""

_RUN = """
d=/run/atoll.$1 a=$2 b=$3 cwd=$4
shift 4
exec 4>"$d/o" 5>"$d/e"
tell() { printf '\\036%s\\037%s%s\\036' "$a" "$b" "$1" >&4; printf '\\036%s\\037%s%s\\036' "$a" "$b" "$1" >&5; }
run() (
    exec >&4 2>&5 4>&- 5>&-
    export PATH="${PATH:-/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin}" HOME="${HOME:-/root}"
    [ -z "$cwd" ] || cd -- "$cwd" || exit 126
    exec "$@"
)
"""

RUN = _RUN + 'run "$@" </dev/null\ntell "$?"\n'
"""Runs a command in slot `$1`, in the folder `$4` (`` for any); `$2` and `$3` make the end of its output."""

# The reader sees the end of the file until QEMU has told the guest that the host is there, so the host begins with a
# line of its own. It closes its side when the command has ended, which ends `cat`.
RUN_WITH_STDIN = (
    PORT
    + 'port "org.atoll.in.$1" && exec 6<"$p" || exit 97\n'
    + _RUN
    + """
{
    i=0
    until read -r _; do [ $((i += 1)) -lt 5000 ] || exit 1; done
    exec cat 4>&- 5>&- 6<&-
} <&6 | { exec 6<&-; run "$@"; tell "$?"; }
"""
)

RUN_CAPTURED = """
cwd=$1
shift
export PATH="${PATH:-/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin}" HOME="${HOME:-/root}"
[ -z "$cwd" ] || cd -- "$cwd" || exit 126
exec "$@"
"""

KILL = """
root=$1 d=$2
# The slot may have a new command, with relays of its own in the same place, before this has ended.
if [ -n "$d" ] && [ -p "$d/o" ] && [ -p "$d/e" ]; then exec 8<>"$d/o" 9<>"$d/e"; fi
o=/proc/$$/fd/8 e=/proc/$$/fd/9
round=0
while [ $((round += 1)) -le 50 ]; do
    all=" $root " found=
    grown=1
    while [ -n "$grown" ]; do
        grown=
        for s in /proc/[0-9]*/stat; do
            read -r line <"$s" || continue
            pid=${line%% *} rest=${line##*) }
            set -- $rest
            case $1 in Z) continue;; esac
            case $all in *" $pid "*) continue;; *" $2 "*) all="$all$pid "; grown=1;; esac
        done
    done
    if [ -n "$d" ]; then
        for f in /proc/[0-9]*/fd/[1245]; do
            if [ "$f" -ef "$o" ] || [ "$f" -ef "$e" ]; then pid=${f#/proc/}; all="$all${pid%%/*} "; fi
        done
    fi
    for pid in $all; do
        [ "$pid" != $$ ] && kill -9 "$pid" && found=1
    done
    [ -n "$found" ] || exit 0
done 2>/dev/null
"""
"""Kills process `$1`, all that came from it, and all whose output goes to the relays in the folder `$2`."""


def relay_folder(slot: int) -> str:
    return f"/run/atoll.{slot}"


def command_of(request: ExecRequest) -> list[str]:
    """The argv that runs the request as its user and with its environment. Raises `InvalidInput`."""
    if not request.argv or not request.argv[0]:
        raise InvalidInput("there is no command to run", next_step="Give one: `atoll exec VM -- uname -a`.")
    _check((*request.argv, request.cwd or "", request.user or "", *request.env, *request.env.values()))
    if request.cwd is not None and not request.cwd.startswith("/"):
        raise InvalidInput(f"{request.cwd!r} can't be a working folder", "it isn't an absolute path")
    command = list(request.argv)
    if request.env:
        command = ["env", "--", *_assignments(request.env), *_not_an_assignment(command)]
    if request.user:
        if request.user.startswith("-"):
            raise InvalidInput(f"{request.user!r} can't be a user's name")
        # Both busybox and util-linux hand what follows the name to the shell: $0, $1 ….
        command = ["su", "-s", "/bin/sh", "-c", 'exec "$@"', "--", request.user, "sh", *command]
    return command


def _assignments(env: dict[str, str]) -> list[str]:
    for name in env:
        if not name or "=" in name:
            raise InvalidInput(f"{name!r} can't be the name of an environment variable")
    return [f"{name}={value}" for name, value in env.items()]


def _not_an_assignment(command: list[str]) -> list[str]:
    # env(1) would take a program named `a=b` for one more variable.
    return ["sh", "-c", 'exec "$@"', "sh", *command] if "=" in command[0] else command


def _check(words: Sequence[str]) -> None:
    for word in words:
        if "\0" in word:
            raise InvalidInput(f"{word!r} has a zero byte in it", "no program can be given one")
        try:
            word.encode()
        except UnicodeEncodeError as error:
            raise InvalidInput(
                f"{word!r} isn't UTF-8", "the guest agent takes only text", "Pass such bytes by standard input."
            ) from error
