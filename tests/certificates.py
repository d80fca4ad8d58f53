"""A certificate authority for tests: servers, clients and names as a test wants them, made by the openssl command."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path
from typing import Any

CERTIFICATES = """
[req]
distinguished_name = name
prompt = no
[name]
CN = llmbench test
[ca]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
[leaf]
basicConstraints = CA:FALSE
keyUsage = critical, digitalSignature, keyEncipherment
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
subjectAltName = IP:127.0.0.1, DNS:localhost
[elsewhere]
basicConstraints = CA:FALSE
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
subjectAltName = DNS:elsewhere.example
[client]
basicConstraints = CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = clientAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
"""


class Authority:
    """A certificate authority of our own, and what it signed."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.settings = directory / "openssl.cnf"
        self.settings.write_text(CERTIFICATES)
        self.certificate = directory / "ca.pem"
        self.openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-extensions", "ca",
                     "-keyout", directory / "ca.key", "-out", self.certificate)  # fmt: skip

    def openssl(self, command: str, *words: Any) -> None:
        """Runs openssl; raises when it fails."""
        config = ["-config", self.settings] if command == "req" else []
        words = ("openssl", command, *config, *words)
        subprocess.run(list(map(str, words)), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def issue(self, extensions: str) -> tuple[Path, Path]:
        """A new certificate with these extensions, and its key."""
        key, request, signed = (self.directory / (extensions + ending) for ending in (".key", ".csr", ".pem"))
        self.openssl("req", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", request)
        self.openssl("x509", "-req", "-in", request, "-CA", self.certificate, "-CAkey", self.directory / "ca.key",
                     "-set_serial", "7", "-days", "2", "-extfile", self.settings, "-extensions", extensions,
                     "-out", signed)  # fmt: skip
        return signed, key

    def server_side(self, extensions: str = "leaf") -> ssl.SSLContext:
        """The TLS context of a server whose certificate has these extensions."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*map(str, self.issue(extensions)))
        return context
