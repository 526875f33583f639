"""A socket that a server of ours listens at, or a plain reason why there can be none."""

from __future__ import annotations

import errno
import socket

from cpfean import commands
from cpfean.errors import ConfigError, ServiceError

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens there; what is wrong is told by the flags --host and --port.

    Raises:
        ConfigError: no such host, none of this machine, or a port for root alone.
        ServiceError: something listens there already.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
            bound.listen()
        except BaseException:
            bound.close()
            raise
    except socket.gaierror as error:
        raise ConfigError(f"--host {host}: no such host ({error}).") from None
    except PermissionError:
        raise ConfigError(f"--port {port} is for root; take one above 1023.") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ServiceError(
                f"--port {port}: something listens there already, another server perhaps; "
                f"`{commands.listeners(port)}` names it. Take another --port, or stop it."
            ) from None
        raise ConfigError(f"--host {host} is no address of this host ({error}).") from None
    return bound
