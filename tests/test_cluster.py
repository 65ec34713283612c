"""Connecting to a cluster that is not there."""

import socket
import time

import pytest

from pipelines import cluster
from pipelines.artifacts import StageError
from pipelines.settings import RaySettings


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_where_nobody_listens_is_told_at_once(scheme: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = time.monotonic()
    with (
        pytest.raises(StageError, match=f"no Ray cluster answers at '{scheme}127.0.0.1:{port}'"),
        cluster.connected(RaySettings(address=f"{scheme}127.0.0.1:{port}")),
    ):
        pass
    assert time.monotonic() - started < 5
