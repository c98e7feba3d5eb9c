"""Tells Ray that this machine is about to be taken away, where what takes it away only stops a process or a pod.

Kubernetes sends SIGTERM to a pod and nothing to Ray. A hook before that (`preStop`) calls `drain_this_node`: Ray then
knows a preemption, trainings write a checkpoint and go on until the deadline, and the end does not count as a failure.
"""

from __future__ import annotations

import logging
import socket
import time

import psutil
import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.core.generated.autoscaler_pb2 import DrainNodeReason  # type: ignore[attr-defined]

from fewstep.errors import FewstepError

logger = logging.getLogger(__name__)

_TRAIN_WORKER = "ray::RayTrainWorker"
_LOOK_EVERY_S = 1.0
_CONNECT_TIMEOUT_S = 5.0


def drain_this_node(address: str, *, deadline_s: float, node_id: str | None = None) -> bool:
    """Drain the Ray node of this machine with the reason preemption, and wait until its training workers have gone.

    Does nothing where none runs: a cluster that is taken down after its work shall not wait.

    Args:
        address: of the cluster, host:port.
        deadline_s: seconds until the machine is gone.
        node_id: of the node, hexadecimal; None: the only one with this machine's address.

    Returns:
        Whether there was anything to drain.

    Raises:
        FewstepError: no cluster answers there, this machine has no node in it, or Ray does not accept.
    """
    if not _train_workers():
        return False
    deadline = time.monotonic() + deadline_s
    try:
        # Ray's own client tries for most of a minute, which a pod that is stopped does not have.
        host, _, port = address.rpartition(":")
        socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT_S).close()
        client = GcsClient(address=address)
    except (RuntimeError, OSError, ValueError, ray.exceptions.RpcError) as error:
        raise FewstepError(
            f"no Ray cluster answers at {address} ({error}); $RAY_ADDRESS must name it as host:port"
        ) from error
    try:
        node_id = node_id or _own_node(client, address)
        accepted, reason = client.drain_node(
            node_id,
            DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
            "the machine is about to be taken away",
            int((time.time() + deadline_s) * 1000),
        )
    except (RuntimeError, ValueError, ray.exceptions.RpcError) as error:
        raise FewstepError(
            f"the Ray at {address} could not drain node {node_id or 'of this machine'}: {error}"
        ) from error
    if not accepted:
        raise FewstepError(f"Ray does not drain its node {node_id}: {reason}")
    logger.info("node %s is drained: it will be gone in %.0f s", node_id, deadline_s)
    while _train_workers() and time.monotonic() < deadline:
        time.sleep(_LOOK_EVERY_S)
    return True


def _train_workers() -> list[psutil.Process]:
    """Return the training workers of this machine; in a container, those of the container."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        title = (process.info["cmdline"] or [""])[0]
        if title.startswith(_TRAIN_WORKER):
            found.append(process)
    return found


def _own_node(client: GcsClient, address: str) -> str:
    own = ray.util.get_node_ip_address()
    nodes = [
        node_id.hex()
        for node_id, info in client.get_all_node_info().items()
        if info.node_manager_address == own and info.state == 0
    ]
    if len(nodes) != 1:
        raise FewstepError(
            f"the Ray at {address} has {len(nodes)} nodes with this machine's address {own}, not one; name it by "
            "--node-id"
        )
    return str(nodes[0])
