"""The address that a server listens at."""

import errno
import os
import socket

from training.system.errors import UserError

NO_ADDRESS = "there is no such address; take 127.0.0.1 or one of this machine"


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address; refuses one that is taken or not this machine's."""
    if not 0 <= port <= 65535:
        raise UserError(f"port={port}: must be from 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise UserError(f"host={host}: {NO_ADDRESS}") from error
    try:
        if os.name == "posix":  # elsewhere it would let two servers share a port
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen()
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRNOTAVAIL:
            raise UserError(f"host={host}: {NO_ADDRESS}") from error
        raise UserError(f"host={host} port={port}: {error.strerror}; choose another --port") from error
    return listening


def address_of(listening: socket.socket) -> str:
    """Where a browser or a client on this machine finds it."""
    address, port = listening.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(address, f"[{address}]" if ":" in address else address)
    return f"http://{shown}:{port}"


def is_open_to_others(listening: socket.socket) -> bool:
    """Whether other machines reach it."""
    return listening.getsockname()[0] not in ("127.0.0.1", "::1")
