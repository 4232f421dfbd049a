"""The fields of a JobSet that a launch may hold, after the published API jobset.x-k8s.io/v1alpha2: types, required ones, choices.

A field of the JobSet that is not here is refused, so a slip of the pen is seen before a cluster drops it in silence. The Jobs inside
belong to Kubernetes: here stands what our rules read of them, the whole is held to Kubernetes' own schema (`check_job`).
"""

from __future__ import annotations

import importlib
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


class _Open(pydantic.BaseModel):
    """Part of a Job: the fields that the rules read; of others Kubernetes' own schema is the judge."""

    model_config = pydantic.ConfigDict(extra="allow", strict=True)


class Capabilities(_Open):
    """A container's `securityContext.capabilities`."""

    add: list[str] | None = None


class SecurityContext(_Open):
    """A container's `securityContext`."""

    privileged: bool | None = None
    allowPrivilegeEscalation: bool | None = None
    capabilities: Capabilities | None = None


class Resources(_Open):
    """A container's `resources`."""

    limits: dict[str, int | str] | None = None


class Mount(_Open):
    """One of a container's `volumeMounts`."""

    name: str
    mountPath: str
    readOnly: bool | None = None


class Volume(_Open):
    """One of a pod's `volumes`."""

    name: str


class Container(_Open):
    """One of a pod's `containers`."""

    name: str
    command: list[str] | None = None
    args: list[str] | None = None
    resources: Resources | None = None
    securityContext: SecurityContext | None = None
    volumeMounts: list[Mount] | None = None


class Pod(_Open):
    """A pod's `spec`."""

    containers: Annotated[list[Container], Field(min_length=1)]
    initContainers: list[Container] | None = None
    volumes: list[Volume] | None = None
    nodeSelector: dict[str, str] | None = None
    restartPolicy: Literal["Never", "OnFailure"] | None = None
    terminationGracePeriodSeconds: Count | None = None


class PodTemplate(_Open):
    """A Job's `template`."""

    spec: Pod


class OnExitCodes(_Strict):
    """Which exit codes a rule is about."""

    containerName: str | None = None
    operator: Literal["In", "NotIn"]
    values: Annotated[list[int], Field(min_length=1)]


class PodFailureRule(_Open):
    """One of `podFailurePolicy.rules`."""

    action: Literal["FailJob", "FailIndex", "Ignore", "Count"]
    onExitCodes: OnExitCodes | None = None


class PodFailurePolicy(_Strict):
    """A Job's `podFailurePolicy`."""

    rules: list[PodFailureRule]


class Job(_Open):
    """A Job's `spec`."""

    completions: Annotated[int, Field(ge=1)] | None = None
    parallelism: Count | None = None
    completionMode: Literal["Indexed", "NonIndexed"] | None = None
    backoffLimit: Count | None = None
    podFailurePolicy: PodFailurePolicy | None = None
    template: PodTemplate


class JobTemplate(_Strict):
    """A Job's metadata and spec."""

    metadata: dict[str, Any] | None = None
    spec: Job


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
    """The manifest as data (without what is null, which means left out), and what is wrong with it as a JobSet."""
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        return None, [f"is not YAML: {_one_line(error)}"]
    try:
        manifest = JobSet.model_validate(data)
    except pydantic.ValidationError as error:
        return None, [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
    return manifest.model_dump(exclude_none=True), []


def check_job(template: dict[str, Any]) -> list[str] | None:
    """What Kubernetes' own schema finds wrong with a Job, None when the package that carries it is not installed."""
    try:
        kubernetes_validate = importlib.import_module("kubernetes_validate")  # of the extra `launch`: 100 MB of schemas
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
