"""A Kubernetes JobSet on GKE: one Job a slice, one pod a host, restarted whole.

The restart rule, over three levels. A pod is never restarted alone (`restartPolicy: Never`), nor is a slice (`backoffLimit: 0`): the
processes of a run live and die together. A pod that exits with 78 fails its Job with the reason PodFailurePolicy, which fails the
JobSet for good; any other failure, 42 among them, recreates every Job, `maxRestarts` times.
"""

from __future__ import annotations

from typing import Any

from conan_jax.errors import EXIT_BAD_INPUT
from conan_jax.launch.command import platform_variables, train_command
from conan_jax.launch.spec import LaunchSpec

JOBS = "slice"
CONTAINER = "train"
COORDINATOR_PORT = 8476
RESOURCES = {"tpu": "google.com/tpu", "gpu": "nvidia.com/gpu"}


def jobset(spec: LaunchSpec) -> dict[str, Any]:
    """The JobSet as plain data."""
    metadata: dict[str, Any] = {"name": spec.name}
    if spec.namespace:
        metadata["namespace"] = spec.namespace
    if spec.queue:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": spec.queue}
    if spec.hardware.topology and spec.hardware.hosts > 1:  # the pods of a slice share one node pool, and share it with nobody
        metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "suspend": False,
            "network": {"enableDNSHostnames": True},
            "successPolicy": {"operator": "All"},
            "failurePolicy": {
                "maxRestarts": spec.max_restarts,
                "restartStrategy": "BlockingRecreate",  # the old pods are gone before new ones open the run's folder
                "rules": [
                    {"name": "wrongInput", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]},
                    {"name": "resumable", "action": "RestartJobSet", "onJobFailureReasons": ["BackoffLimitExceeded", "DeadlineExceeded"]},
                ],
            },
            "replicatedJobs": [{"name": JOBS, "replicas": spec.slices, "template": {"spec": _job(spec)}}],
        },
    }


def _job(spec: LaunchSpec) -> dict[str, Any]:
    job: dict[str, Any] = {
        "completionMode": "Indexed",
        "completions": spec.hardware.hosts,
        "parallelism": spec.hardware.hosts,
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [
            {"action": "FailJob", "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": [EXIT_BAD_INPUT]}},
        ]},
        "template": {"spec": _pod(spec)},
    }
    if spec.time_limit_minutes:
        job["activeDeadlineSeconds"] = spec.time_limit_minutes * 60
    return job


def _pod(spec: LaunchSpec) -> dict[str, Any]:
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": spec.grace_seconds,
        "automountServiceAccountToken": False,
        "securityContext": {"seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [_container(spec)],
        "volumes": [{"name": "output", "persistentVolumeClaim": {"claimName": spec.output_claim}}],
    }
    hardware = spec.hardware
    if hardware.topology:
        pod["nodeSelector"] = {
            "cloud.google.com/gke-tpu-accelerator": hardware.chip.gke_label, "cloud.google.com/gke-tpu-topology": hardware.topology}
    elif hardware.chip.gke_label:
        pod["nodeSelector"] = {"cloud.google.com/gke-accelerator": hardware.chip.gke_label}
        pod["volumes"].append({"name": "shared-memory", "emptyDir": {"medium": "Memory"}})  # what NCCL exchanges inside a node
    if spec.node_selector:
        pod["nodeSelector"] = pod.get("nodeSelector", {}) | dict(item.split("=", 1) for item in spec.node_selector)
    if spec.tolerations:
        pod["tolerations"] = [_toleration(item) for item in spec.tolerations]
    if spec.service_account:
        pod["serviceAccountName"] = spec.service_account
    return pod


def _container(spec: LaunchSpec) -> dict[str, Any]:
    chip, per_host = spec.hardware.chip, spec.hardware.chips_per_host
    container: dict[str, Any] = {
        "name": CONTAINER,
        "image": spec.image,
        "command": [_literal(argument) for argument in train_command(spec)],  # no shell between SIGTERM and Python
        "env": _environment(spec),
        "volumeMounts": [{"name": "output", "mountPath": spec.output_mount}],
        "securityContext": {"privileged": False, "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    if spec.working_dir:
        container["workingDir"] = spec.working_dir
    devices = {RESOURCES[chip.platform]: per_host} if chip.platform in RESOURCES else {}
    share = {name: value for name, value in (("cpu", spec.cpu), ("memory", spec.memory)) if value is not None}
    if devices or share:
        container["resources"] = {"requests": share | devices, "limits": dict(devices)}
    if chip.platform == "gpu":
        container["volumeMounts"].append({"name": "shared-memory", "mountPath": "/dev/shm"})
    return container


def _toleration(item: str) -> dict[str, str]:
    """TAINT tolerates any value of the taint, TAINT=VALUE that one; whatever the effect."""
    key, equals, value = item.partition("=")
    return {"key": key, "operator": "Equal", "value": value} if equals else {"key": key, "operator": "Exists"}


def _environment(spec: LaunchSpec) -> list[dict[str, Any]]:
    """On a TPU jax finds its peers by itself; elsewhere pod 0 of the one Job is where they meet."""
    variables: list[dict[str, Any]] = [{"name": name, "value": value} for name, value in platform_variables(spec).items()]
    if not spec.hardware.topology:
        index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
        variables += [
            {"name": "CONAN_COORDINATOR", "value": f"{spec.name}-{JOBS}-0-0.{spec.name}:{COORDINATOR_PORT}"},
            {"name": "CONAN_NUM_PROCESSES", "value": str(spec.processes)},
            {"name": "CONAN_PROCESS_ID", "valueFrom": {"fieldRef": {"fieldPath": index}}},
        ]
    return variables + [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": spec.secret, "key": name}}} for name in spec.environment]


def _literal(argument: str) -> str:
    """Kubernetes replaces $(NAME) in a command and reads $$ as $."""
    return argument.replace("$", "$$")
