"""A Ray cluster with two CPUs for the time that standard input is open; prints its address."""

import socket
import sys

from ray.cluster_utils import Cluster

# A loaded machine needs longer than the 15 seconds that a raylet waits for agents to find ports of their own.
AGENTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")


def free_ports() -> dict[str, int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in AGENTS]
    found = {name: listening.getsockname()[1] for name, listening in zip(AGENTS, sockets, strict=True)}
    for listening in sockets:
        listening.close()
    return found


cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, **free_ports()})
cluster.add_node(num_cpus=1, **free_ports())
sys.stdout.write(f"{cluster.address}\n")
sys.stdout.flush()
sys.stdin.read()
cluster.shutdown()
