"""A Ray cluster on this machine whose autoscaler starts and ends worker nodes: Ray's fake provider, each node a raylet of its own."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ray.util import get_node_ip_address
from running import free_ports, processes, wait_until_gone

HEAD = "f" * 51 + "00000"
"""Id that the fake provider gives to the head."""
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"


@contextlib.contextmanager
def autoscaling(root: Path, types: dict[str, dict[str, Any]], idle_minutes: float = 0.25, v2: bool = True) -> Iterator[str]:
    """Yields the address of a cluster whose head has no CPU.

    Args:
        root: for the config, and a mark in the environment of all its processes.
        types: node types: `resources`, `min_workers`, `max_workers`.
        idle_minutes: after which a node that does nothing goes.
        v2: Ray's newer autoscaler.
    """
    (port,) = free_ports(1)
    address = f"{get_node_ip_address()}:{port}"
    kinds = {name: {"node_config": {}, "min_workers": 0} | kind for name, kind in types.items()}
    kinds["ray.head.default"] = {"node_config": {}, "resources": {"CPU": 0}, "min_workers": 0, "max_workers": 0}
    config = {
        "cluster_name": "test",
        "max_workers": 16,
        "upscaling_speed": 100.0,
        "idle_timeout_minutes": idle_minutes,
        # By its class: for its name Ray reads an example that the wheel lacks. Without the flags every node is a failed launch, and killed.
        "provider": {"type": "external", "module": PROVIDER, "gcs_address": address}
        | {"disable_node_updaters": True, "disable_launch_config_check": True}
        | ({"launch_multiple": True, "head_node_id": HEAD} if v2 else {}),
        "auth": {"ssh_user": "ubuntu"},
        "available_node_types": kinds,
        "head_node_type": "ray.head.default",
        **{part: [] for part in ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands")},
        **{part: [] for part in ("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files")},
        "file_mounts": {},
    }
    file = root / "autoscaling.json"
    file.write_text(json.dumps(config))
    marks = {"GSIL_TEST": str(root), "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1", "RAY_AUTH_MODE": "disabled"}
    if v2:
        marks |= {"RAY_enable_autoscaler_v2": "1", "RAY_CLOUD_INSTANCE_ID": HEAD, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD}
    ray = str(Path(sys.executable).with_name("ray"))
    options = [f"--port={port}", "--num-cpus=0", "--include-dashboard=false", f"--autoscaling-config={file}", "--disable-usage-stats"]
    try:
        subprocess.run([ray, "start", "--head", *options], check=True, capture_output=True, env=os.environ | marks, timeout=120)
        yield address
    finally:
        # `ray stop` would end every Ray on the machine.
        for pid in processes(root):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until_gone(root, 60)
