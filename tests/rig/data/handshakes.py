"""Shake hands with ports as somebody: a folder holds one file a person, key and certificate.

``handshakes.py FOLDER HOST PORT [PORT ...]`` prints, for each port and person, whether the other
side let them in, and the serial number of the certificate that it showed. ``nobody`` has no
certificate; ``old`` and ``older`` have the right one and speak TLS 1.1 and TLS 1.0.
"""

from __future__ import annotations

import json
import socket
import ssl
import sys
import warnings
from pathlib import Path

OLD = {"old": ssl.TLSVersion.TLSv1_1, "older": ssl.TLSVersion.TLSv1}
#: What a client of HTTP/2 says first, with empty settings; whoever was let in is answered.
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


def context(folder: Path, person: str) -> ssl.SSLContext:
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.set_alpn_protocols(["h2"])
    # The other side is to refuse, so this one does not.
    made.check_hostname, made.verify_mode = False, ssl.CERT_NONE
    if person in OLD:
        warnings.simplefilter("ignore", DeprecationWarning)
        made.minimum_version = made.maximum_version = OLD[person]
        made.set_ciphers("ALL:@SECLEVEL=0")
    if person != "nobody":
        made.load_cert_chain(folder / f"{'right' if person in OLD else person}.pem")
    return made


def meet(made: ssl.SSLContext, host: str, port: int) -> tuple[str, str]:
    """Return how it went, ``in`` or why not, and the serial number of what was shown."""
    serial = ""
    try:
        with (
            socket.create_connection((host, port), timeout=5) as plain,
            made.wrap_socket(plain, server_hostname=host) as connection,
        ):
            shown = connection.getpeercert(binary_form=True)
            if shown:
                serial = f"{_serial(shown):x}"
            connection.sendall(PREFACE)
            return ("in" if connection.recv(9) else "closed"), serial
    except OSError as error:
        return f"{type(error).__name__}: {error}", serial


def _serial(shown: bytes) -> int:
    from cryptography import x509

    return x509.load_der_x509_certificate(shown).serial_number


def main(folder: Path, host: str, ports: list[int]) -> None:
    people = sorted(path.stem for path in folder.glob("*.pem"))
    found = {}
    for port in ports:
        for person in (*people, "nobody", *OLD):
            verdict, serial = meet(context(folder, person), host, port)
            found[f"{port} {person}"] = {"verdict": verdict, "serial": serial}
    print(json.dumps(found))


main(Path(sys.argv[1]), sys.argv[2], [int(word) for word in sys.argv[3:]])
