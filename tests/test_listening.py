"""What a server listens at can be reached; where it cannot listen, it says why."""

from __future__ import annotations

import socket

import pytest

from cpfean.errors import ConfigError, ServiceError
from cpfean.listening import listening


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServiceError, match=f"--port {port}: something listens there"):
            listening("127.0.0.1", port)


def test_an_address_of_another_host_is_refused() -> None:
    with pytest.raises(ConfigError, match="no address of this host"):
        listening("192.0.2.1", 7860)


def test_what_listens_can_be_reached() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with listening("127.0.0.1", port) as bound, socket.create_connection(("127.0.0.1", port)):
        assert bound.getsockname()[1] == port
