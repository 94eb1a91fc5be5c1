"""Checksum files as the publishers write them."""

import pytest

from atoll.errors import DownloadFailed, InvalidInput
from atoll.images import checksums

SHA256, SHA512, OTHER = "ab" * 32, "cd" * 64, "ef" * 32
LISTS = {
    "Debian's SHA512SUMS": f"{OTHER * 2}  debian-13-generic-arm64.qcow2\n{SHA512}  disk.qcow2\n",
    "Ubuntu's SHA256SUMS": f"{OTHER} *disk.qcow2.manifest\n{SHA256} *disk.qcow2\n",
    "Fedora's CHECKSUM": "-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA256\n\n# disk.qcow2: 508559360 bytes\n"
    f"SHA256 (disk.qcow2) = {SHA256}\nSHA256 (other.qcow2) = {OTHER}\n-----BEGIN PGP SIGNATURE-----\n\n"
    f"iQIzBAEBCAAdFiEE\n=abcd\n-----END PGP SIGNATURE-----\n",
    "Rocky's CHECKSUM": f"# disk.qcow2: 1 bytes\nSHA256 (disk.qcow2) = {SHA256.upper()}\n",
    "FreeBSD's CHECKSUM.SHA512": f"SHA512 (other.raw.xz) = {OTHER * 2}\nSHA512 (disk.qcow2) = {SHA512}\n",
    "Arch's .SHA256": f"{SHA256}  disk.qcow2\n",
    "Alpine's .sha512, digits alone": f"{SHA512}\n",
    "a path before the name, Windows line ends": f"{SHA256}  ./images/disk.qcow2\r\n",
}


@pytest.mark.parametrize("listing", LISTS.values(), ids=LISTS.keys())
def test_publishers_lists_are_read(listing: str) -> None:
    found = checksums.find_in(listing, "disk.qcow2", origin="https://example.org/SUMS")
    assert found in (checksums.Checksum("sha256", SHA256), checksums.Checksum("sha512", SHA512))


@pytest.mark.parametrize(
    "listing",
    ["", "<html>not found</html>", f"{OTHER}  disk.qcow2.asc\n{OTHER}  my-disk.qcow2\n", f"{'ab' * 16}  disk.qcow2\n"],
    ids=["empty", "a web page", "names that only look alike", "MD5"],
)
def test_a_list_without_the_file_is_an_error(listing: str) -> None:
    with pytest.raises(DownloadFailed, match=r"has no checksum for disk\.qcow2"):
        checksums.find_in(listing, "disk.qcow2", origin="https://example.org/SUMS")


def test_the_stronger_of_two_checksums_is_taken() -> None:
    both = f"SHA256 (disk.qcow2) = {SHA256}\nSHA512 (disk.qcow2) = {SHA512}\n"
    assert checksums.find_in(both, "disk.qcow2", origin="x").algorithm == "sha512"


@pytest.mark.parametrize("text", [f"sha256:{SHA256}", SHA256.upper(), f"  SHA256:{SHA256}\n"])
def test_users_write_checksums_in_several_ways(text: str) -> None:
    assert str(checksums.parse(text)) == f"sha256:{SHA256}"


@pytest.mark.parametrize("text", ["", "sha256:", f"sha512:{SHA256}", "md5:" + "a" * 32, "sha256:" + "g" * 64])
def test_what_is_no_checksum_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="is not a checksum"):
        checksums.parse(text)
