"""Cloud TPU VMs through queued resources: the older way, for projects without a cluster.

Every VM runs the same start-up script at every boot. It holds a lock, so a second copy ends at once, and starts the command again
until that is done, refuses its input, or has used up its restarts.
"""

from __future__ import annotations

import shlex

from conan_jax.errors import EXIT_BAD_INPUT
from conan_jax.launch.command import bash_array, bash_preamble, train_command
from conan_jax.launch.spec import LaunchSpec


def create_command(spec: LaunchSpec, startup_script: str) -> list[str]:
    """`gcloud` as a list of arguments; it asks for the slices and gives their VMs the script."""
    nodes = [f"--node-id={spec.name}"] if spec.slices == 1 else [f"--node-count={spec.slices}", f"--node-prefix={spec.name}"]
    account = [f"--service-account={spec.service_account}"] if spec.service_account else []
    return [
        "gcloud", "compute", "tpus", "queued-resources", "create", spec.name, *nodes,
        f"--project={spec.project}", f"--zone={spec.zone}",
        f"--accelerator-type={spec.hardware.tpu_vm_type}", f"--runtime-version={spec.hardware.chip.runtime}", *account,
        f"--metadata-from-file=startup-script={startup_script}",
    ]


def startup_script(spec: LaunchSpec) -> str:
    """The script every VM runs at boot. SIGTERM is handed on to Python, and nothing is started after it."""
    lines = [
        "#!/usr/bin/env bash",
        "set -u",
        f"exec 9> {shlex.quote(f'/var/lock/conan-{spec.name}')}",
        "flock --nonblock 9 || exit 0",
        *bash_preamble(spec),
        *bash_array("command", train_command(spec)),
        "child='' stopping=0",
        "trap 'stopping=1; trap \"\" TERM; [ -z \"$child\" ] || kill -TERM \"$child\"' TERM",
        f"for ((attempt = 0; attempt <= {spec.max_restarts} && stopping == 0; attempt++)); do",
        '  "${command[@]}" &',
        "  child=$!",
        '  wait "$child"',
        "  code=$?",
        '  if [ "$stopping" -eq 1 ]; then  # the signal ended `wait`, not the child',
        '    wait "$child"',
        "    code=$?",
        "  fi",
        "  child=''",
        f'  if [ "$code" -eq 0 ] || [ "$code" -eq {EXIT_BAD_INPUT} ] || [ "$stopping" -eq 1 ]; then break; fi',
        '  echo "exit code $code" >&2',
        "  sleep 10",
        "done",
        'exit "$code"',
    ]
    return "\n".join(lines) + "\n"
