"""Ports of this machine: whether one is free, and keeping it from others."""

from __future__ import annotations

import socket
import sys

from clipfleet.errors import SetupError


def bind(host: str, port: int) -> socket.socket:
    """A socket that has the port and does not listen. Raises OSError if it is not free."""
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        # Lets a port in TIME_WAIT pass, but not one that somebody listens on, even with SO_REUSEPORT as HAProxy does.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError:
        bound.close()
        raise
    return bound


def claim_port(host: str, port: int, option: str) -> socket.socket:
    """Make sure that `port` is free, and keep other instances from it until the returned socket is closed.

    Raises SetupError, which names the option that chooses another one.
    """
    linux = sys.platform.startswith("linux")
    claim = socket.socket(socket.AF_UNIX if linux else socket.AF_INET)
    try:
        bind(host, port).close()
        if linux:
            claim.bind(f"\0clipfleet-port-{port}")  # abstract: nothing on disk, gone with this process
    except (OSError, UnicodeError) as error:  # the second is of a name that is none
        claim.close()
        raise SetupError(
            f"cannot listen on {host}:{port}: {getattr(error, 'strerror', None) or error}. Choose another with {option}."
        ) from None
    return claim
