"""TLS in front of a service: certificates of a folder's own authority, and a relay that ends TLS.

The service itself speaks plain HTTP, as it does behind any load balancer.  Whoever calls has to
trust the authority: `Certificates.trusted` is what an operator puts into the environment.
"""

import select
import socket
import socketserver
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from coatcheck.server import catalog as catalogs
from coatcheck.server import setup
from coatcheck.server.changes import Actor
from coatcheck.server.settings import Settings
from coatcheck.server.store import open_store
from support.live import Live, free_port, serve, wait_until_ready
from support.secrets import SWEEP

LOOPBACK: Final = "127.0.0.1"
_DAY: Final = timedelta(days=1)
#: For a handshake, and for the rest of a record.
_PATIENCE_S: Final = 5
_POLL_S: Final = 0.05
_CHUNK_BYTES: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class Certificates:
    """An authority, and a server's side of TLS on 127.0.0.1 with a certificate that it signed."""

    authority: Path
    server: ssl.SSLContext

    @property
    def trusted(self) -> Mapping[str, str]:
        """The environment of a caller that trusts this authority and no other.

        OpenSSL, and with it urllib, httpx and httpx2, reads the first; requests the second.
        """
        return {
            "SSL_CERT_FILE": str(self.authority),
            "REQUESTS_CA_BUNDLE": str(self.authority),
        }


def certificates(folder: Path) -> Certificates:
    """Make an authority and a certificate, good for a day.  No private key stays in the folder."""
    authority_key, server_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Authority of a test")])
    signer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
    authority = (
        _builder(name, name, authority_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_may_sign_certificates(), critical=True)
        .sign(authority_key, hashes.SHA256())
    )
    server = (
        _builder(x509.Name([]), name, server_key.public_key())
        # A certificate without a subject has its names here, marked critical: RFC 5280 §4.2.1.6.
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ip_address(LOOPBACK))]), critical=True
        )
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        # Python 3.13 checks strictly, and wants to see who signed.
        .add_extension(signer, critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    made = Certificates(folder / "ca.pem", ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
    made.authority.write_bytes(authority.public_bytes(serialization.Encoding.PEM))
    private = server_key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    chain = folder / "server.pem"
    # Python loads a private key from a file only.
    chain.touch(0o600)
    try:
        chain.write_bytes(private + server.public_bytes(serialization.Encoding.PEM))
        made.server.load_cert_chain(chain)
    finally:
        chain.unlink()
    return made


def _builder(
    subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _DAY)
        .not_valid_after(now + _DAY)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _may_sign_certificates() -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )


@contextmanager
def a_front(made: Certificates, upstream_port: int) -> Iterator[int]:
    """A port of 127.0.0.1 where TLS ends; what comes out goes to the other port.

    Connections that are open when the block ends break off.
    """
    with _Front(made, upstream_port) as front:
        thread = threading.Thread(target=front.serve_forever, args=(_POLL_S,), daemon=True)
        thread.start()
        try:
            yield front.server_address[1]
        finally:
            front.stop()
            thread.join()


class _Front(socketserver.ThreadingTCPServer):
    """A thread for each connection."""

    def __init__(self, made: Certificates, upstream_port: int) -> None:
        super().__init__((LOOPBACK, 0), _Relay)
        self.context = made.server
        self.upstream_port = upstream_port
        #: Every thread looks at the one end; hanging up at the other tells them all.
        self.end, self._other_end = socket.socketpair()

    def stop(self) -> None:
        self.shutdown()
        self._other_end.close()

    def server_close(self) -> None:
        super().server_close()  # waits for the threads
        self.end.close()


class _Relay(socketserver.BaseRequestHandler):
    server: _Front
    request: socket.socket

    def handle(self) -> None:
        self.request.settimeout(_PATIENCE_S)
        # A client that does not trust the certificate hangs up: that is its affair.
        with (
            suppress(OSError),
            self.server.context.wrap_socket(self.request, server_side=True) as outside,
            socket.create_connection((LOOPBACK, self.server.upstream_port)) as inside,
        ):
            while self._copy(outside, inside):
                pass

    def _copy(self, outside: ssl.SSLSocket, inside: socket.socket) -> bool:
        """Wait, and copy what there is.  False when either side, or the front, is done."""
        ready: list[socket.socket] = [outside]
        if not outside.pending():
            ready = select.select([outside, inside, self.server.end], [], [])[0]
        for source, target in ((outside, inside), (inside, outside)):
            if source in ready:
                chunk = source.recv(_CHUNK_BYTES)
                if not chunk:
                    return False
                target.sendall(chunk)
        return self.server.end not in ready


@contextmanager
def a_service_behind_tls(
    folder: Path, made: Certificates, path: str, **settings: str
) -> Iterator[Live]:
    """A service just initialized whose issuer is https, on 127.0.0.1 and below this path.

    Args:
        settings: `COATCHECK_*`, lower case and without the prefix.
    """
    port = free_port()
    with a_front(made, port) as front_port:
        issuer = f"https://{LOOPBACK}:{front_port}{path}"
        environment = {
            "COATCHECK_ISSUER": issuer,
            "COATCHECK_DATABASE_URL": f"sqlite:///{folder}/coatcheck.db",
            "COATCHECK_KEYS_DIR": str(folder / "keys"),
            **{f"COATCHECK_{name.upper()}": value for name, value in settings.items()},
        }
        initialized = _initialize(environment)
        process = serve(environment, folder / "serve.log", "--port", str(port))
        live = Live(issuer, folder, environment, initialized, process)
        try:
            wait_until_ready(replace(live, issuer=f"http://{LOOPBACK}:{port}{path}"))
            SWEEP.process(process.pid)
            SWEEP.learn_deployment(folder)
            yield live
            # Its end takes the log of its database away.
            SWEEP.file(folder / "coatcheck.db-wal")
        finally:
            process.terminate()
            process.wait(timeout=20)


def _initialize(environment: Mapping[str, str]) -> Mapping[str, str]:
    """What `coatcheck init --json` does and prints, without the second that a command takes."""
    settings = Settings.load(environment)
    store = open_store(settings.database_url)
    try:
        initialized = setup.initialize(
            settings,
            catalogs.without_file(settings),
            store,
            Actor("cli:tester"),
            now=int(time.time()),
            organization_name="Acme",
        )
    finally:
        store.close()
    return {name: str(value) for name, value in initialized.to_json().items()}
