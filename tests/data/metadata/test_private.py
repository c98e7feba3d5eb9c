"""Which addresses img2dataset may not connect to; in a process of its own, as the rule changes its sockets for good."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import socket, sys
from fewstep.data.metadata.inside_img2dataset import refuse_private

socket.socket.connect = lambda self, address: None  # nothing is really asked
refuse_private()
for address in sys.argv[1:]:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as ours:
        try:
            ours.connect((address, 9))
            print(address, "let")
        except OSError as error:
            print(address, "refused" if "is no public address" in str(error) else error)
"""


def tried(*addresses: str, **environment: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *addresses], env=kept | environment, capture_output=True, text=True, check=True
    )
    return dict(line.split() for line in done.stdout.splitlines())


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "224.0.0.1", "::1",
     "fe80::1%lo", "fd00::1", "::ffff:10.0.0.1"],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    assert tried(address) == {address: "refused"}


def test_public_addresses_and_a_proxy_of_ones_own() -> None:
    assert tried("8.8.8.8", "2001:4860:4860::8888") == {"8.8.8.8": "let", "2001:4860:4860::8888": "let"}
    # Port 9 alone is the proxy's.
    assert tried("127.0.0.1", HTTPS_PROXY="http://127.0.0.1:9") == {"127.0.0.1": "let"}
    assert tried("127.0.0.1", HTTPS_PROXY="http://127.0.0.1:10") == {"127.0.0.1": "refused"}
