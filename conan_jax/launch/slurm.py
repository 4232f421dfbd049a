"""A SLURM batch script: tasks started by `srun`, requeued by the exit code of their command."""

from __future__ import annotations

import shlex

from conan_jax.errors import EXIT_BAD_INPUT
from conan_jax.launch.command import bash_array, bash_preamble, platform_variables, train_command
from conan_jax.launch.spec import LaunchSpec


def directives(spec: LaunchSpec) -> dict[str, str]:
    """The `#SBATCH` options, by name. Their values hold nothing that SLURM or a shell would read as anything else."""
    options = {"job-name": spec.name}
    chip = spec.hardware.chip
    if chip.platform == "gpu":
        options |= {"nodes": str(spec.hosts), "ntasks-per-node": str(spec.hardware.chips_per_host),
                    "gpus-per-node": str(spec.hardware.chips_per_host)}
    elif chip.platform == "tpu":
        options |= {"nodes": str(spec.hosts), "ntasks-per-node": "1"}
    else:
        options |= {"ntasks": str(spec.processes)}
    for option, value in (("partition", spec.queue), ("account", spec.account), ("time", spec.time_limit_minutes)):
        if value is not None:
            options[option] = str(value)
    for item in spec.sbatch:
        option, _, value = item.partition("=")
        options[option] = value
    return options | {
        "requeue": "",
        "open-mode": "append",
        "output": "%x-%j.out",
        "signal": f"TERM@{spec.grace_seconds}",  # to the tasks, not to this script
    }


def batch_script(spec: LaunchSpec) -> str:
    """The script for `sbatch`.

    Each task gets SIGTERM from SLURM itself, `grace_seconds` before a time limit, on preemption or from `scancel --signal=TERM`.
    `--wait` ends the tasks that are left when one has been gone for as long.
    """
    srun = ["srun", "--kill-on-bad-exit=0", f"--wait={spec.grace_seconds}", *train_command(spec)]
    lines = ["#!/usr/bin/env bash"]
    lines += [f"#SBATCH --{option}={value}" if value else f"#SBATCH --{option}" for option, value in directives(spec).items()]
    lines += [
        "set -u",
        "trap : TERM  # this script outlives the signal that tells its tasks to save",
        *bash_preamble(spec),
        *(f"export {name}={shlex.quote(value)}" for name, value in platform_variables(spec).items()),
        *bash_array("command", srun),
        '"${command[@]}"',
        "code=$?",
        'case "$code" in',
        "  0) ;;",
        f"  {EXIT_BAD_INPUT}) echo 'wrong configuration or data: not requeued' >&2 ;;",
        "  *)",
        f'    if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {spec.max_restarts} ]; then',
        '      echo "exit code $code: requeued" >&2',
        '      scontrol requeue "$SLURM_JOB_ID"',
        "    fi",
        "    ;;",
        "esac",
        'exit "$code"',
    ]
    return "\n".join(lines) + "\n"
