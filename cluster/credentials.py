"""Credentials of one cluster: only who has them is let in, and nobody beside can listen."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from distributed import Security

_BEFORE, _AFTER = dt.timedelta(days=30), dt.timedelta(days=3650)


def fresh_security(folder: Path | None = None) -> Security:
    """Make a key and a certificate that signs itself, for scheduler, workers and client alike; they die with us.

    folder : private, where they lie as files, for workers that are not our children; in memory when left out
    `Security.temporary` does so, too, but from this very second on, which has not come yet on a node whose clock is
    behind.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "slidecube")])
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BEFORE)
        .not_valid_after(now + _AFTER)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
    public = made.public_bytes(serialization.Encoding.PEM).decode()
    if folder is not None:
        private, public = (_filed(folder / name, text) for name, text in (("key", private), ("cert", public)))
    roles = ("client", "scheduler", "worker")
    return Security(
        require_encryption=True,
        tls_ca_file=public,
        **{f"tls_{role}_cert": public for role in roles},
        **{f"tls_{role}_key": private for role in roles},
    )


def _filed(path: Path, text: str) -> str:
    path.touch(mode=0o600)
    path.write_text(text, encoding="ascii")
    return str(path)
