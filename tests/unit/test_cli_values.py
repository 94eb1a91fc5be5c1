"""What users write after options, and how tables fit: pure functions of the command line."""

import pytest

from atoll.cli.attach import KeyWatch, parse_keys
from atoll.cli.copy import Place, parse_place
from atoll.cli.execute import in_place
from atoll.cli.failures import printable
from atoll.cli.options import parse_disk, parse_pairs, parse_ports, parse_share, without_dashes
from atoll.cli.output import cells, cut, table_lines
from atoll.cli.progress import amount
from atoll.errors import InvalidInput
from atoll.model.operation import Progress
from atoll.model.requests import DiskRequest
from atoll.model.vm import ExecRequest


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("8080:80", ["127.0.0.1:8080:80/tcp"]),
        ("localhost:8080:80/tcp", ["127.0.0.1:8080:80/tcp"]),
        ("0.0.0.0:5353:53/udp", ["0.0.0.0:5353:53/udp"]),
        ("8000-8002:9000-9002", [f"127.0.0.1:{8000 + n}:{9000 + n}/tcp" for n in range(3)]),
        ("1:65535", ["127.0.0.1:1:65535/tcp"]),
    ],
)
def test_ports_are_read_as_docker_users_write_them(text: str, told: list[str]) -> None:
    assert [str(port) for port in parse_ports(text)] == told


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("80", "doesn't publish"),
        ("8080:", "doesn't publish"),
        ("0:80", "is no port"),
        ("8080:65536", "is no port"),
        ("8010-8000:8010-8000", "is no port"),
        ("8000-8010:80-85", "11 and 6 ports"),
        ("[::1]:8080:80", "IPv6"),
        ("300.0.0.1:80:80", "no IPv4 address"),
        ("8080:80/sctp", "doesn't publish"),
        ("٨٠٨٠:80", "doesn't publish"),
    ],
)
def test_ports_that_cannot_be_are_refused_with_the_form_to_write(text: str, why: str) -> None:
    with pytest.raises(InvalidInput, match=why) as refused:
        parse_ports(text)
    assert refused.value.next_step


def test_disks_are_a_size_or_pairs() -> None:
    assert parse_disk("10GiB") == DiskRequest(size="10GiB")
    assert parse_disk("name=data,size=1G,bus=nvme") == DiskRequest(name="data", size="1G", bus="nvme")
    with pytest.raises(InvalidInput, match="colour"):
        parse_disk("size=1G,colour=red")
    with pytest.raises(InvalidInput, match="bus"):
        parse_disk("size=1G,bus=usb9")


def test_pairs_keep_what_stands_after_the_first_equals_sign() -> None:
    assert parse_pairs(["a=1", "b=x=y", "c="], option="--label") == {"a": "1", "b": "x=y", "c": ""}
    for wrong in ("a", "=1", ""):
        with pytest.raises(InvalidInput, match="--label"):
            parse_pairs([wrong], option="--label")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("web:/srv", Place("web", "/srv")),
        ("web:C:\\Users", Place("web", "C:\\Users")),
        ("site", Place(None, "site")),
        ("./a:b", Place(None, "./a:b")),
        ("/tmp/a:b", Place(None, "/tmp/a:b")),
        ("-", Place(None, "-")),
    ],
)
def test_copies_know_which_side_is_in_a_vm(text: str, place: Place) -> None:
    assert parse_place(text) == place


@pytest.mark.parametrize("text", ["web:relative", "web:", ":/srv"])
def test_a_guests_path_is_absolute_and_its_vm_named(text: str) -> None:
    with pytest.raises(InvalidInput):
        parse_place(text)


def test_detach_keys_are_found_across_reads_and_nothing_typed_is_lost() -> None:
    watch = KeyWatch(parse_keys("ctrl-p,ctrl-q"))
    assert watch.feed(b"ab\x10") == b"ab"
    assert watch.feed(b"c") == b"\x10c"
    assert watch.feed(b"\x10") == b""
    assert watch.feed(b"\x10") == b"\x10"
    assert not watch.found
    assert watch.feed(b"\x11ls\n") == b""
    assert watch.found


def test_detach_keys_have_names() -> None:
    assert parse_keys("ctrl-]") == b"\x1d"
    assert parse_keys("ctrl-a,d") == b"\x01d"
    for wrong in ("", "ctrl-", "ctrl-é", "f1", "ctrl-p,,"):
        with pytest.raises(InvalidInput):
            parse_keys(wrong)


def test_wide_and_combining_characters_are_counted_as_terminals_show_them() -> None:
    assert [cells(text) for text in ("web", "日本", "🐧x", "é", "e\u0301")] == [3, 4, 3, 1, 1]
    assert cut("日本語です", 5) == "日本…"
    assert cut("web", 3) == "web"


def test_tables_are_as_wide_as_the_terminal_and_whole_without_one() -> None:
    rows = [("web", "running", "a/very/long/image/name:with-a-tag"), ("数据库", "stopped", "tiny")]
    headers = ("NAME", "STATE", "IMAGE")
    for width in (30, 40, 80):
        assert max(cells(line) for line in table_lines(headers, rows, width)) <= width
    assert any("with-a-tag" in line for line in table_lines(headers, rows, None))
    columns = {line.index("st" if "st" in line else "ST") for line in table_lines(headers, [rows[0]], None)[:1]}
    assert columns == {6}


def test_what_guests_wrote_cannot_steer_the_terminal() -> None:
    assert printable("a\x1b[2Jb\u009bc") == "a\\x1b[2Jb\\x9bc"
    assert printable("two\nlines, 日本 🐧") == "two\nlines, 日本 🐧"


def test_progress_is_told_in_the_units_of_its_step() -> None:
    assert amount(Progress(step="fetch", done=1 << 20, total=4 << 20, unit="bytes")) == "1MiB of 4MiB"
    assert amount(Progress(step="fetch", done=512, unit="bytes")) == "512B"
    assert amount(Progress(step="convert", done=40.2, total=100, unit="percent")) == "40%"
    assert amount(Progress(step="boot")) == ""


def test_commands_for_a_terminal_get_folder_and_environment_from_a_shell() -> None:
    assert in_place(ExecRequest(argv=("top",))) == ("top",)
    placed = in_place(ExecRequest(argv=("make", "a b"), env={"V": "1 2"}, cwd="/src"))
    assert placed == ("sh", "-c", 'cd -- "$0" && exec env "$@"', "/src", "V=1 2", "make", "a b")


def test_only_the_first_dashes_are_ours() -> None:
    assert without_dashes(("--", "ls", "--", "x")) == ("ls", "--", "x")
    assert without_dashes(("ls",)) == ("ls",)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("./a:/b", ("./a", "/b", False)),
        ("/a:/b:ro", ("/a", "/b", True)),
        ("/a:/b:rw", ("/a", "/b", False)),
        ("/a\\:x:/b\\:y", ("/a:x", "/b:y", False)),
    ],
)
def test_a_share_is_two_paths_and_how(text: str, told: tuple[str, str, bool]) -> None:
    share = parse_share(text)
    assert (share.host_path, share.guest_path, share.read_only) == told


@pytest.mark.parametrize("text", ["", "/a", "/a:", ":/b", "/a:/b:xx", "/a:/b:ro:more"])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="shares no folder"):
        parse_share(text)
