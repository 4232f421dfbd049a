"""What is to be launched, where, and as what: one validated object, from which every manifest follows.

Names are held to the rule of the system that reads them (RFC 1123 and 1035 for Kubernetes, SLURM's and Google Cloud's own), and no
value may hold a control character: what is left is either too plain to mean anything to a shell, or quoted where one reads it.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from conan_jax import config_io
from conan_jax.errors import ConfigError
from conan_jax.hardware import Accelerator, accelerator

TARGETS = ("gke-jobset", "slurm", "tpu-vm", "local")

_LABEL = r"[a-z]([-a-z0-9]*[a-z0-9])?"  # RFC 1035, the stricter sibling of an RFC 1123 label: job names become host names
_DOTTED = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*"
_IMAGE = r"[a-z0-9]([a-z0-9._:/-]*[a-z0-9])?(:[A-Za-z0-9_][A-Za-z0-9._-]{0,127})?(@sha256:[0-9a-f]{64})?"
_SLURM = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
_CLOUD = r"[a-z][-a-z0-9:.]*[a-z0-9]"

# field -> (what it must look like, the longest it may be, how to say so)
_SHAPES = {
    "name": (_LABEL, 40, "lower-case letters, digits and '-', from a letter to a letter or digit (RFC 1035)"),
    "namespace": (_LABEL, 63, "an RFC 1123 label"),
    "queue": (rf"({_DOTTED}|{_SLURM})", 63, "the name of a queue"),
    "service_account": (rf"{_DOTTED}(@{_DOTTED})?", 253, "an RFC 1123 name, or an address of Google Cloud"),
    "secret": (_DOTTED, 253, "an RFC 1123 name"),
    "output_claim": (_DOTTED, 253, "an RFC 1123 name"),
    "image": (_IMAGE, 400, "an image reference such as europe-docker.pkg.dev/project/repository/conan:1"),
    "account": (_SLURM, 63, "letters, digits, '_', '.' and '-'"),
    "project": (_CLOUD, 63, "a project id of Google Cloud"),
    "zone": (_LABEL, 40, "a zone such as us-east5-b"),
    "cpu": (r"[0-9]+(\.[0-9]+|m)?", 20, "a quantity of Kubernetes: 96, 7500m"),
    "memory": (r"[0-9]+(\.[0-9]+)?([KMGT]i?)?", 20, "a quantity of Kubernetes: 160Gi"),
    "stage": (r"[A-Za-z0-9][A-Za-z0-9_.-]*", 63, "the name of a stage"),
}
_VARIABLE = r"[A-Z_][A-Z0-9_]*"
_KEY = rf"({_DOTTED}/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?"  # of a label or a taint
_VALUE = r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?"
# What a site may ask of a node and of its share, beside what follows from the accelerator.
SBATCH = ("comment", "constraint", "cpu-bind", "cpus-per-task", "exclude", "exclusive", "gres", "hint", "licenses", "mail-type",
          "mail-user", "mem", "mem-bind", "mem-per-cpu", "mem-per-gpu", "nice", "nodelist", "prefer", "priority", "qos", "reservation",
          "switches")
# field -> (what each of its items must look like, how to say so)
_ITEM_SHAPES = {
    "sbatch": (rf"({'|'.join(SBATCH)})(=[A-Za-z0-9@%_.,:&|()\[\]*+=/-]+)?",
               f"OPTION=VALUE of sbatch, without spaces, with one of the options {', '.join(SBATCH)}"),
    "node_selector": (rf"{_KEY}={_VALUE}", "LABEL=VALUE of Kubernetes, as cloud.google.com/gke-spot=true"),
    "tolerations": (rf"{_KEY}(={_VALUE})?", "TAINT or TAINT=VALUE of Kubernetes"),
}
_OURS = ("CONAN_COORDINATOR", "CONAN_NUM_PROCESSES", "CONAN_PROCESS_ID", "JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES")

# Fields that only some targets read: given elsewhere they are refused, not ignored.
_READ_BY = {
    "image": ("gke-jobset",), "namespace": ("gke-jobset",), "output_claim": ("gke-jobset",), "secret": ("gke-jobset",),
    "node_selector": ("gke-jobset",), "tolerations": ("gke-jobset",), "cpu": ("gke-jobset",), "memory": ("gke-jobset",),
    "account": ("slurm",), "sbatch": ("slurm",), "project": ("tpu-vm",), "zone": ("tpu-vm",),
    "output_mount": ("gke-jobset",), "queue": ("gke-jobset", "slurm"), "service_account": ("gke-jobset", "tpu-vm"),
    "time_limit_minutes": ("gke-jobset", "slurm"), "grace_seconds": ("gke-jobset", "slurm"),
    "max_restarts": ("gke-jobset", "slurm", "tpu-vm"), "environment": ("gke-jobset", "slurm", "local"),
}
_NEEDED_BY = {
    "gke-jobset": ("image", "output_claim"), "tpu-vm": ("project", "zone"), "slurm": (), "local": (),
}


@dataclass(frozen=True)
class LaunchSpec:
    """One launch. What a target does not read must be left at None; what it needs must be given.

    `config`, `overrides`, `stage`: as `conan train` takes them. `accelerator` and `chips_per_host`: as `hardware.accelerator` takes them.
    `slices` such accelerators are joined over the data-centre network. `working_dir` is where `config` is found: in the image, or on
    the machines. `output_mount` is where pods find `output_claim`, a claim that all of them may write to; the run's folder lies on it.
    `environment` names variables that the job needs: their values come from `secret` on Kubernetes, from whoever starts it elsewhere,
    and are written nowhere; a TPU VM boots without any, so its paths go into the recipe. `sbatch`, `node_selector`, `tolerations`, `cpu`
    and `memory` are what a site wants beside what follows from the accelerator. `time_limit_minutes` is one attempt's; `grace_seconds` pass
    between SIGTERM and the end.
    Raises `ConfigError` naming the field.
    """

    target: str
    name: str
    config: str
    accelerator: str
    overrides: tuple[str, ...] = ()
    stage: str | None = None
    slices: int = 1
    chips_per_host: int | None = None
    python: str = "python"
    working_dir: str | None = None
    image: str | None = None
    namespace: str | None = None
    output_claim: str | None = None
    output_mount: str = "/output"
    queue: str | None = None
    account: str | None = None
    service_account: str | None = None
    project: str | None = None
    zone: str | None = None
    environment: tuple[str, ...] = ()
    secret: str | None = None
    sbatch: tuple[str, ...] = ()
    node_selector: tuple[str, ...] = ()
    tolerations: tuple[str, ...] = ()
    cpu: str | None = None
    memory: str | None = None
    time_limit_minutes: int | None = None
    grace_seconds: int = 300
    max_restarts: int = 20

    def __post_init__(self) -> None:
        _check(self.target in TARGETS, "target", self.target, f"one of {', '.join(TARGETS)}")
        for field in dataclasses.fields(self):
            self._check_field(field.name, getattr(self, field.name))
        self._check_sizes()
        for name in self.environment:
            _check(re.fullmatch(_VARIABLE, name) is not None, "environment", name, "a variable's name without its value (CONAN_DATA)")
            _check(name not in _OURS, "environment", name, "none of those that conan sets itself")
        for field in dataclasses.fields(self):
            given = getattr(self, field.name) != field.default
            read = self.target in _READ_BY.get(field.name, TARGETS)
            _check(not given or read, field.name, getattr(self, field.name), f"left out: {self.target} does not read it")
        for name in _NEEDED_BY[self.target]:
            _check(getattr(self, name) is not None, name, None, f"given: {self.target} needs it")
        if self.environment and self.target == "gke-jobset":
            _check(self.secret is not None, "secret", None, "given: it holds the values of the variables in `environment`")

    def _check_field(self, name: str, value: Any) -> None:
        values = value if isinstance(value, tuple) else (value,)
        for item in values:
            if isinstance(item, str):
                _check(bool(item) and item.isprintable(), name, item, "printable and not empty: no newline, no control character")
        if name in _SHAPES and value is not None:
            pattern, longest, words = _SHAPES[name]
            fits = len(value) <= longest and re.fullmatch(pattern, value) is not None
            _check(fits, name, value, f"{words}, at most {longest} characters")
        if name in _ITEM_SHAPES:
            pattern, words = _ITEM_SHAPES[name]
            keys = [item.partition("=")[0] for item in value]
            for item in value:
                _check(len(item) <= 200 and re.fullmatch(pattern, item) is not None, name, item, f"{words}; at most 200 characters")
            _check(len(set(keys)) == len(keys), name, value, "each named once")
        if name in ("config", "python"):
            _check(not value.startswith("-"), name, value, "a path: it would be read as an option")
        if name in ("working_dir", "output_mount") and value is not None:
            _check(value.startswith("/") and ".." not in value.split("/") and ":" not in value, name, value, "an absolute path")
        if name == "overrides":
            for item in value:
                _check("=" in item and not item.startswith("-"), name, item, "KEY=VALUE")

    def _check_sizes(self) -> None:
        for name, least, most in (("slices", 1, 256), ("grace_seconds", 1, 86_400), ("max_restarts", 0, 10_000),
                                  ("time_limit_minutes", 1, 525_600), ("chips_per_host", 1, 65_536)):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            _check((value is None and name in ("time_limit_minutes", "chips_per_host")) or (whole and least <= value <= most),
                   name, value, f"a whole number from {least} to {most}")
        limit = self.time_limit_minutes
        _check(limit is None or 60 * limit >= 2 * self.grace_seconds, "time_limit_minutes", limit,
               f"at least twice the grace of {self.grace_seconds} s: an attempt is told to stop that long before its end")
        platform = self.hardware.chip.platform
        _check(self.slices == 1 or platform == "tpu", "slices", self.slices, f"1: {self.accelerator} is no TPU slice, ask for more of them")
        _check(self.slices == 1 or self.target != "slurm", "slices", self.slices,
               "1 under SLURM: nothing there tells TPU slices of each other; use gke-jobset for several")
        _check(self.target != "tpu-vm" or platform == "tpu", "accelerator", self.accelerator, "a TPU: tpu-vm has no other machines")

    @cached_property
    def hardware(self) -> Accelerator:
        """One slice."""
        return accelerator(self.accelerator, self.chips_per_host)

    @property
    def hosts(self) -> int:
        """Machines, over all slices."""
        return self.hardware.hosts * self.slices

    @property
    def chips(self) -> int:
        """Devices, over all slices."""
        return self.hardware.chips * self.slices

    @property
    def processes(self) -> int:
        """Processes that train together: one a host, except that SLURM starts one for each GPU, as jax expects of it."""
        return self.chips if self.target == "slurm" and self.hardware.chip.platform == "gpu" else self.hosts


def to_dict(spec: LaunchSpec) -> dict[str, Any]:
    """Plain data for launch.json, without what was left out."""
    return {key: value for key, value in config_io.to_dict(spec).items() if value not in (None, [])}


def from_dict(data: dict[str, Any]) -> LaunchSpec:
    """The inverse of `to_dict`; raises `ConfigError` naming the key."""
    return config_io.build(LaunchSpec, data, "launch.json")


def _check(ok: bool, name: str, value: Any, wanted: str) -> None:
    if not ok:
        raise ConfigError(f"{name} = {value!r} must be {wanted}")
