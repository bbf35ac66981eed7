"""Ports at which processes of a test meet."""

from __future__ import annotations

import random
import socket

# Below those that systems give to whoever asks for none (from 32,768 on Linux): such a port, found
# free, may be a connection's of another process before anybody listens at it.
_RANGE = range(10_000, 20_000)


def free_ports(count: int) -> list[int]:
    """Find ports at which nobody listens, each another."""
    found: list[int] = []
    for port in random.SystemRandom().sample(_RANGE, len(_RANGE)):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                found.append(port)
        if len(found) == count:
            break
    return found


def free_port() -> int:
    """Find a port at which nobody listens."""
    [port] = free_ports(1)
    return port
