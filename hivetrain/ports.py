"""Free ports for servers that start later than their port is named.

The system hands out port 0 from one range, and so do its outgoing connections: a port drawn there may be somebody
else's by the time its server starts. Below that range nobody is given a port that he did not ask for.
"""

from __future__ import annotations

import contextlib
import random
import socket
from pathlib import Path

LOOPBACK = "127.0.0.1"
LOWEST = 10_000
RANGE_FILE = Path("/proc/sys/net/ipv4/ip_local_port_range")
DEFAULT_RANGE_START = 32_768
"""Where the system's own range starts on Linux; other systems start theirs higher."""
ATTEMPTS = 1_000


def bind(port: int, host: str = LOOPBACK) -> socket.socket:
    """A TCP socket bound to that port; the caller closes it.

    Raises:
        OSError: the port is in use.
    """
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # else a port just left counts as taken
    try:
        sock.bind((host, port))
    except OSError:
        sock.close()
        raise
    return sock


def bind_free(host: str = LOOPBACK) -> socket.socket:
    """A TCP socket bound to a free port that the system gives to nobody by itself; the caller closes it.

    Raises:
        OSError: none was found free.
    """
    draw = random.SystemRandom()
    for _ in range(ATTEMPTS):
        with contextlib.suppress(OSError):
            return bind(draw.randrange(LOWEST, _range_start()), host)
    raise OSError(f"no free port of {host} between {LOWEST:,} and {_range_start():,}")


def free_port(host: str = LOOPBACK) -> int:
    """A port on which nobody listens, and which nobody is given who does not ask for it."""
    with bind_free(host) as sock:
        return int(sock.getsockname()[1])


def _range_start() -> int:
    try:
        start = int(RANGE_FILE.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return DEFAULT_RANGE_START
    return start if start >= 2 * LOWEST else DEFAULT_RANGE_START
