"""A JobSet manifest against its schema, and against what a run of conan needs of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from conan_jax import config
from conan_jax.errors import EXIT_BAD_INPUT
from conan_jax.launch import schema
from conan_jax.launch.findings import Finding
from conan_jax.launch.jobset import RESOURCES
from conan_jax.launch.spec import LaunchSpec
from conan_jax.versions import install_command

SHELLS = {"sh", "bash", "dash", "ash", "zsh", "ksh", "busybox", "env"}
_LONGEST_NAME = 63


def check_jobset(spec: LaunchSpec, text: str, run: config.Run | None) -> Iterator[Finding]:
    """What is wrong with the manifest. Without a JobSet that can be read, only that."""
    manifest, problems = schema.parse(text)
    yield from (Finding("schema", f"{problem} (jobset.x-k8s.io/v1alpha2)") for problem in problems)
    if manifest is None:
        return
    unknown = False
    for replicated in manifest["spec"]["replicatedJobs"]:
        problems = schema.check_job(replicated["template"])
        unknown |= problems is None
        for problem in problems or ():
            yield Finding("kubernetes", f"{replicated['name']}: {problem} (Kubernetes {schema.KUBERNETES})")
    if unknown:
        yield Finding("kubernetes", "the Jobs were not held to Kubernetes' own schema: kubernetes-validate is not installed "
                                    f"({install_command(extra='launch')})", serious=False)
    jobs = [(r, r["template"]["spec"]) for r in manifest["spec"]["replicatedJobs"]]
    pods = [job["template"]["spec"] for _, job in jobs]
    yield from _check_names(manifest)
    yield from _check_devices(spec, jobs)
    yield from _check_restarts(manifest["spec"].get("failurePolicy", {}), jobs)
    for pod in pods:
        yield from _check_privileges(pod)
        yield from _check_signal(pod)
        if run is not None:
            yield from _check_output(pod, run)


def _check_names(manifest: dict[str, Any]) -> Iterator[Finding]:
    """Pod names are host names: NAME-JOBS-JOB-POD-xxxxx must be an RFC 1035 label."""
    for replicated in manifest["spec"]["replicatedJobs"]:
        last = replicated["template"]["spec"].get("completions", 1) - 1
        longest = f"{manifest['metadata']['name']}-{replicated['name']}-{replicated['replicas'] - 1}-{last}-abcde"
        if len(longest) > _LONGEST_NAME or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", longest):
            yield Finding("names", f"pods would be called {longest}: at most {_LONGEST_NAME} characters of a-z, 0-9 and '-', a letter "
                                   "first; use a shorter --name")


def _check_devices(spec: LaunchSpec, jobs: list[tuple[dict[str, Any], dict[str, Any]]]) -> Iterator[Finding]:
    """The pods of all slices hold exactly the accelerators of the launch, on nodes of the right kind."""
    platform, hardware = spec.hardware.chip.platform, spec.hardware
    chips = 0
    for replicated, job in jobs:
        name, pods, pod = replicated["name"], job.get("completions", 1), job["template"]["spec"]
        if job.get("parallelism") != pods or job.get("completionMode") != "Indexed":
            yield Finding("devices", f"{name}: all {pods} pods must run at once and be numbered "
                                     "(parallelism = completions, completionMode Indexed)")
        if platform in RESOURCES:
            limits = [container.get("resources", {}).get("limits", {}).get(RESOURCES[platform]) for container in pod["containers"]]
            each = sum(int(limit) for limit in limits if str(limit).isdecimal())
            if not each:
                yield Finding("devices", f"{name}: no container asks for {RESOURCES[platform]}")
        else:
            each = hardware.chips_per_host
        chips += replicated["replicas"] * pods * each
        selector = pod.get("nodeSelector", {})
        topology = selector.get("cloud.google.com/gke-tpu-topology", "")
        label = selector.get("cloud.google.com/gke-tpu-accelerator") or selector.get("cloud.google.com/gke-accelerator") or ""
        if (topology, label) != (hardware.topology, hardware.chip.gke_label):
            yield Finding("devices", f"{name}: nodes of {label or 'any kind'} {topology} are chosen, while {hardware.name} is "
                                     f"{hardware.chip.gke_label or 'any kind'} {hardware.topology}")
    if chips != spec.chips:
        yield Finding("devices", f"the pods hold {chips} chips together, and {spec.slices} x {hardware.name} is {spec.chips}")


def _check_restarts(policy: dict[str, Any], jobs: list[tuple[dict[str, Any], dict[str, Any]]]) -> Iterator[Finding]:
    """78 ends the JobSet; everything else restarts all of it, and never a part."""
    rules = policy.get("rules", [])
    refused, other = (
        next((rule["action"] for rule in rules if reason in rule.get("onJobFailureReasons", [reason])), "RestartJobSet")
        for reason in ("PodFailurePolicy", "BackoffLimitExceeded"))
    if refused != "FailJobSet":
        yield Finding("restarts", f"exit code {EXIT_BAD_INPUT} would restart the JobSet: PodFailurePolicy must lead to FailJobSet")
    if other == "FailJobSet":
        yield Finding("restarts", "a preempted pod would fail the JobSet: BackoffLimitExceeded must lead to RestartJobSet")
    if policy.get("maxRestarts", 0) < 1 and other != "RestartJobSetAndIgnoreMaxRestarts":
        yield Finding("restarts", "maxRestarts is 0: a preempted run would not come back", serious=False)
    for replicated, job in jobs:
        name = replicated["name"]
        if job.get("backoffLimit") != 0:
            yield Finding("restarts", f"{name}: backoffLimit must be 0, or one pod would be started again alone")
        if job["template"]["spec"].get("restartPolicy") != "Never":
            yield Finding("restarts", f"{name}: restartPolicy must be Never, or a container would be started again alone")
        exits = [rule.get("onExitCodes") for rule in job.get("podFailurePolicy", {}).get("rules", ()) if rule["action"] == "FailJob"]
        codes = [code for exit_codes in exits if exit_codes and exit_codes["operator"] == "In" for code in exit_codes["values"]]
        if codes != [EXIT_BAD_INPUT]:
            yield Finding("restarts", f"{name}: podFailurePolicy must fail the Job on exit code {EXIT_BAD_INPUT} alone, not on {codes}")


def _check_privileges(pod: dict[str, Any]) -> Iterator[Finding]:
    """Nothing here needs more rights than an ordinary process has."""
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(name):
            yield Finding("privileges", f"{name} opens the machine to the pod; leave it out")
    for volume in pod.get("volumes", ()):
        if "hostPath" in volume:
            yield Finding("privileges", f"volume {volume.get('name')} is a folder of the machine (hostPath); use a claim")
    for container in [*pod["containers"], *pod.get("initContainers", ())]:
        security = container.get("securityContext", {})
        if security.get("privileged"):
            yield Finding("privileges", f"container {container['name']} is privileged; leave it out")
        if security.get("allowPrivilegeEscalation") is not False:
            yield Finding("privileges", f"container {container['name']}: allowPrivilegeEscalation must be false")
        added = security.get("capabilities", {}).get("add")
        if added:
            yield Finding("privileges", f"container {container['name']} adds capabilities {', '.join(added)}; leave them out")


def _check_signal(pod: dict[str, Any]) -> Iterator[Finding]:
    """SIGTERM goes to the first process of a container: it must be Python itself."""
    for container in pod["containers"]:
        command = [*container.get("command", ()), *container.get("args", ())]
        program = PurePosixPath(command[0]).name if command else ""
        if not program or program in SHELLS or command[1:4] != ["-m", "conan_jax", "train"]:
            yield Finding("signal", f"container {container['name']} starts {program or 'what its image starts'}: SIGTERM would not reach "
                                    "Python; its command must be the list python, -m, conan_jax, train, ...")


def _check_output(pod: dict[str, Any], run: config.Run) -> Iterator[Finding]:
    """A pod's own disk ends with it: the run's folder must lie on a claim."""
    claims = {v["name"] for v in pod.get("volumes", ()) if "persistentVolumeClaim" in v}
    mounts = [PurePosixPath(m["mountPath"]) for c in pod["containers"] for m in c.get("volumeMounts", ())
              if m["name"] in claims and not m.get("readOnly")]
    folder = PurePosixPath(run.output_dir)
    if not any(folder.is_relative_to(mount) for mount in mounts):
        yield Finding("output", f"output_dir {run.output_dir} lies on no claim that pods may write to "
                                f"({', '.join(map(str, mounts)) or 'none'}): nothing could be resumed; "
                                "leave output_dir to the launch, or set it below the mount")
