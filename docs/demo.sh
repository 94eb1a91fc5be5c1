#!/usr/bin/env bash
# Shows Atoll at work: two systems of different architectures side by side, a command in each, files in and out; a
# running one kept, forked and restored.
# It has an ATOLL_HOME of its own, so it never meets the user's VMs; only its images stay, for the next time.
set -euo pipefail

here=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
PATH=$here/.venv/bin:$PATH
export ATOLL_HOME=${XDG_CACHE_HOME:-$HOME/.cache}/atoll-demo
unset ATOLL_FORMAT
near=near-$$ far=far-$$ fork=fork-$$ # two demos at once don't meet either
bold='' plain=''
if [ -t 1 ]; then bold=$'\033[1m' plain=$'\033[0m'; fi
folder=$(mktemp -d)
cd "$folder"

# Says the command as it would be typed, then runs it.
show() {
    local word line='$'
    for word in "$@"; do
        if [[ $word =~ ^[[:alnum:]_./:=,-]+$ ]]; then line+=" $word"; else line+=" ${word@Q}"; fi
    done
    printf '\n%s%s%s\n' "$bold" "$line" "$plain"
    "$@"
}

fail() {
    printf 'Error: %s\n' "$*" >&2
    exit 1
}

clean_up() {
    local status=$? vm
    trap '' INT TERM HUP # nothing is left behind, however impatient the reader
    trap - EXIT
    printf '\nCleaning up\n'
    for vm in $(atoll ls --quiet); do
        if [ "$vm" = "$near" ] || [ "$vm" = "$fork" ] || [ "$vm" = "$far" ]; then show atoll rm --force "$vm" || status=1; fi
    done
    cd /
    rm -rf "$folder"
    if [ $status = 0 ]; then
        printf '\nThat was Atoll. The images stay in %s for the next time.\n' "$ATOLL_HOME"
    else
        printf '\nThe demonstration ended early (%s).\n' "$status" >&2
    fi
    exit "$status"
}

# An image that an earlier demonstration built serves again.
have_image() {
    local name=$1
    shift
    if ! atoll image show "$name" >/dev/null 2>&1; then show "$@"; fi
}

main() {
    local other=aarch64 begin=$SECONDS second
    if [ "$(uname -m)" = aarch64 ]; then other=x86_64; fi
    second=tiny-$other

    have_image tiny atoll image build tiny
    if ! have_image "tiny-$other" atoll image build tiny --arch "$other"; then
        # Ubuntu has its packages for other architectures on mirrors of their own.
        printf 'The mirror of this computer lacks %s, so the second system is of the same architecture.\n' "$other"
        other=$(uname -m) second=tiny
    fi
    show atoll image ls

    show atoll run --detach tiny --name "$near"
    show atoll run --detach "$second" --name "$far"
    show atoll wait "$near" --timeout 2m
    show atoll wait "$far" --timeout 2m
    show atoll exec "$near" -- uname -nm
    show atoll exec "$far" -- uname -nm
    [ "$(atoll exec "$far" -- uname -m)" = "$other" ] || fail "the other system isn't $other"

    echo "Greetings from $(uname -n)" >letter
    show atoll cp letter "$near:/root/letter"
    show atoll exec "$near" -- sh -c 'tr a-z A-Z < /root/letter > /root/answer'
    show atoll cp "$near:/root/answer" answer
    show cat answer
    [ "$(cat answer)" = "$(tr a-z A-Z <letter)" ] || fail "the file didn't come back as it should"

    show atoll snapshot "$near" answered -m 'the answer is written'
    show atoll fork "$near" --name "$fork"
    show atoll exec "$fork" -- sh -c 'hostname; cat /root/answer; uptime'
    show atoll exec "$near" -- sh -c 'rm /root/*; ls -l /root'
    show atoll restore "$near" answered
    show atoll exec "$near" -- cat /root/answer
    [ "$(atoll exec "$near" -- cat /root/answer)" = "$(cat answer)" ] || fail "the restored VM hasn't got its file"
    show atoll history "$near"

    show atoll ls
    show atoll rm --force "$fork"
    show atoll stop "$near" "$far"
    show atoll ls
    printf '\nThat took %s seconds.\n' "$((SECONDS - begin))"
}

trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
main
