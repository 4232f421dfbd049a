"""The fields of a JobSet that a launch may hold, after the published API jobset.x-k8s.io/v1alpha2: types, required ones, choices.

A field that is not here is refused, so a slip of the pen in a manifest is seen before a cluster drops it in silence. The Jobs inside
belong to Kubernetes and are held to its own schema, `check_job`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import Field, StringConstraints

RFC1123 = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
KUBERNETES = "1.34"  # whose Job schema a pod template is held to; any JobSet that knows these fields runs on it

Label = Annotated[str, StringConstraints(pattern=RFC1123, max_length=63)]
Count = Annotated[int, Field(ge=0, le=2**31 - 1)]


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)


class Network(_Strict):
    """`spec.network`."""

    enableDNSHostnames: bool | None = None
    subdomain: Label | None = None
    publishNotReadyAddresses: bool | None = None


class SuccessPolicy(_Strict):
    """`spec.successPolicy`."""

    operator: Literal["All", "Any"]
    targetReplicatedJobs: list[str] | None = None


class FailurePolicyRule(_Strict):
    """One of `spec.failurePolicy.rules`; the first that matches is applied."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$", max_length=128)]
    action: Literal["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]
    onJobFailureReasons: list[Literal["BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded",
                                      "PodFailurePolicy"]] | None = None
    targetReplicatedJobs: list[str] | None = None


class FailurePolicy(_Strict):
    """`spec.failurePolicy`."""

    maxRestarts: Count = 0
    restartStrategy: Literal["Recreate", "BlockingRecreate"] | None = None
    rules: list[FailurePolicyRule] | None = None


class JobTemplate(_Strict):
    """A Job's metadata and spec."""

    metadata: dict[str, Any] | None = None
    spec: dict[str, Any]


class ReplicatedJob(_Strict):
    """One of `spec.replicatedJobs`."""

    name: Label
    replicas: Count = 1
    template: JobTemplate


class Spec(_Strict):
    """`spec`."""

    suspend: bool | None = None
    network: Network | None = None
    successPolicy: SuccessPolicy | None = None
    failurePolicy: FailurePolicy | None = None
    replicatedJobs: Annotated[list[ReplicatedJob], Field(min_length=1)]
    ttlSecondsAfterFinished: Count | None = None


class Metadata(_Strict):
    """`metadata`."""

    name: Label
    namespace: Label | None = None
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None


class JobSet(_Strict):
    """The whole manifest."""

    apiVersion: Literal["jobset.x-k8s.io/v1alpha2"]
    kind: Literal["JobSet"]
    metadata: Metadata
    spec: Spec


def parse(text: str) -> tuple[dict[str, Any] | None, list[str]]:
    """The manifest as data, and what is wrong with it as a JobSet."""
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        return None, [f"is not YAML: {_one_line(error)}"]
    try:
        JobSet.model_validate(data)
    except pydantic.ValidationError as error:
        return None, [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
    return data, []


def check_job(template: dict[str, Any]) -> list[str] | None:
    """What Kubernetes' own schema finds wrong with a Job, None when the package that carries it is not installed."""
    try:
        import kubernetes_validate
    except ImportError:
        return None
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}, **template}
    try:
        kubernetes_validate.validate(job, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'.'.join(map(str, error.path))}: {_one_line(error.message)}"]
    return []


def _one_line(message: object) -> str:
    return re.sub(r"\s+", " ", str(message)).strip()[:300]
