"""The guard that keeps tests offline must itself be able to fail one."""

import socket

import pytest

from tests.conftest import NetworkUsed, is_local


def test_only_this_machine_is_local() -> None:
    assert is_local(("127.0.0.1", 80)) and is_local(("::1", 80, 0, 0)) and is_local("/tmp/socket")
    assert not is_local(("192.0.2.1", 80)) and not is_local(("example.org", 443))


def test_connections_to_this_machine_work() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        pass


@pytest.mark.parametrize("method", ["connect", "connect_ex"])
def test_connections_elsewhere_fail(method: str, offline: list[tuple[str, int]]) -> None:
    with socket.socket() as connection, pytest.raises(NetworkUsed):
        getattr(connection, method)(("192.0.2.1", 80))
    assert offline == [("192.0.2.1", 80)]  # a swallowed exception would fail the test at its end
    offline.clear()
