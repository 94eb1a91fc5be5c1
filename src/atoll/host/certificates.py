"""A certificate authority of one's own, and the certificates that it gives to an agent and to its clients.

The authority is made once and lives long, since clients have its fingerprint; what it signs is short-lived.
"""

import datetime
import ipaddress
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier
from msgspec import Struct

from atoll.errors import AtollError, StorageFailed, from_os_error
from atoll.host import files

AUTHORITY_LIFETIME = 20 * 365 * 86400.0
SERVER_LIFETIME = 90 * 86400.0
CLIENT_LIFETIME = 365 * 86400.0
_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_DNS_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*", re.ASCII)
_CLOCKS_DIFFER = datetime.timedelta(minutes=10)


class Authority(Struct, frozen=True, kw_only=True):
    """Who signs."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def fingerprint(self) -> str:
        return self.certificate.fingerprint(hashes.SHA256()).hex()


def fingerprint_of(pem: bytes) -> str:
    """The SHA-256 of a certificate, in hexadecimal. Raises `ValueError`."""
    return x509.load_pem_x509_certificate(pem).fingerprint(hashes.SHA256()).hex()


def authority(folder: Path) -> Authority:
    """The authority that is kept in `folder`; it is made at first use. Raises `StorageFailed`."""
    kept, lock = folder / "ca-key.pem", folder / "ca.lock"
    with files.locked(lock):
        if not kept.exists():
            _make(folder)
        try:
            pem = kept.read_bytes()
            key = serialization.load_pem_private_key(pem, password=None)
            certificate = x509.load_pem_x509_certificate(pem)
        except OSError as error:
            raise from_os_error(error, f"read {kept}") from error
        except ValueError as error:
            raise _damaged(kept, error) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise _damaged(kept, "it has a key of another kind")
    return Authority(certificate=certificate, key=key)


def _damaged(path: Path, why: object) -> AtollError:
    return StorageFailed(
        f"{path} can't be used",
        str(why),
        "Put it back from a backup; or remove the folder it is in, then all clients have to join anew.",
    )


def _make(folder: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    public = key.public_key()
    # Authorities of several computers have to differ in their names, or a client that trusts two mixes them up.
    name = _name(f"Atoll {os.uname().nodename} {os.urandom(4).hex()}"[:64])
    builder = _builder(name, public, issuer=name, lifetime=AUTHORITY_LIFETIME)
    usage = _usage(key_cert_sign=True, crl_sign=True)
    certificate = (
        builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .sign(key, hashes.SHA256())
    )
    files.write_atomically(folder / "ca.pem", certificate.public_bytes(serialization.Encoding.PEM))
    files.write_atomically(folder / "ca-key.pem", _together(certificate, key))


def server_certificate(issuer: Authority, names: Sequence[str], *, lifetime: float = SERVER_LIFETIME) -> bytes:
    """A certificate for a server of these names and addresses, and its key, as one PEM text."""
    alternatives = x509.SubjectAlternativeName([_alternative(each) for each in names])
    return _signed(
        issuer, _name(names[0][:64]), ExtendedKeyUsageOID.SERVER_AUTH, lifetime=lifetime, alternatives=alternatives
    )


def client_certificate(issuer: Authority, name: str, token_id: str, *, lifetime: float = CLIENT_LIFETIME) -> bytes:
    """A certificate that stands for a token, and its key, as one PEM text."""
    return _signed(issuer, _name(name, serial=token_id), ExtendedKeyUsageOID.CLIENT_AUTH, lifetime=lifetime)


def names_in(pem: bytes) -> list[str]:
    """What a server's certificate is for."""
    found = x509.load_pem_x509_certificate(pem).extensions.get_extension_for_class(x509.SubjectAlternativeName)
    return [str(each.value) for each in found.value]


def is_good(pem: bytes, *, issuer: Authority, names: Collection[str], now: float) -> bool:
    """Whether a server's certificate is of this issuer, for all of these names, and in the first 2/3 of its life."""
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        certificate.verify_directly_issued_by(issuer.certificate)
        known = set(names_in(pem))
    except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound):
        return False
    begins, ends = certificate.not_valid_before_utc + _CLOCKS_DIFFER, certificate.not_valid_after_utc
    return set(names) <= known and now < begins.timestamp() + (ends - begins).total_seconds() * 2 / 3


def _signed(
    issuer: Authority,
    subject: x509.Name,
    purpose: ObjectIdentifier,
    *,
    lifetime: float,
    alternatives: x509.SubjectAlternativeName | None = None,
) -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    public = key.public_key()
    identifier = issuer.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
    builder = (
        _builder(subject, public, issuer=issuer.certificate.subject, lifetime=lifetime)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier.value), critical=False)
    )
    if alternatives is not None:
        builder = builder.add_extension(alternatives, critical=False)
    return _together(builder.sign(issuer.key, hashes.SHA256()), key)


def _builder(
    subject: x509.Name, public: ec.EllipticCurvePublicKey, *, issuer: x509.Name, lifetime: float
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCKS_DIFFER)
        .not_valid_after(now + datetime.timedelta(seconds=lifetime))
    )


def _name(common: str, *, serial: str | None = None) -> x509.Name:
    parts = [x509.NameAttribute(NameOID.COMMON_NAME, common)]
    if serial is not None:
        parts.append(x509.NameAttribute(NameOID.SERIAL_NUMBER, serial))
    return x509.Name(parts)


def _usage(**granted: bool) -> x509.KeyUsage:
    every = (
        "digital_signature content_commitment key_encipherment data_encipherment key_agreement key_cert_sign crl_sign"
        " encipher_only decipher_only"
    )
    return x509.KeyUsage(**dict.fromkeys(every.split(), False) | granted)


def is_name(name: str) -> bool:
    """Whether a server can be called that: a name of DNS, or an address."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return len(name) <= 253 and _DNS_NAME.fullmatch(name) is not None
    return True


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _together(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> bytes:
    """One file, so that nobody reads a certificate and the key of another one."""
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return certificate.public_bytes(serialization.Encoding.PEM) + private
