"""Where a sidecar listens."""

from __future__ import annotations

import socket

_MAX_SOCKET_PATH = 107  # sockaddr_un holds 108 bytes with the terminating zero


def target(address: str) -> str:
    """The gRPC target for ``unix:/path``, ``unix:///path``, ``host:port`` or ``http://host:port``. Raises ValueError for anything else."""
    if address.startswith("unix:"):
        path = address.removeprefix("unix:").removeprefix("//")
        if not path.startswith("/"):
            raise ValueError(f"address {address!r}: the path of a Unix socket must be absolute")
        if len(path.encode()) > _MAX_SOCKET_PATH:
            raise ValueError(f"address {address!r}: the path of a Unix socket may be at most {_MAX_SOCKET_PATH} bytes long")
        return f"unix:{path}"
    host, _, port = address.removeprefix("http://").removesuffix("/").rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or "/" in host:
        raise ValueError(f"address {address!r}: expected unix:/path/to/socket or host:port")
    return f"{host}:{port}"


def on_this_machine(address: str) -> bool:
    """Whether the sidecar that listens there is on this machine, though perhaps in another container. False where its name is not known."""
    host, _, port = target(address).rpartition(":")
    if host == "unix":
        return True
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    return any(_can_be_bound(family, (place[0], 0, *place[2:])) for family, _, _, _, place in found)


def _can_be_bound(family: int, place: tuple[object, ...]) -> bool:
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind(place)
        except OSError:
            return False
    return True
