"""`conan launch`: render a job for a scheduler, check it offline, submit it, or run its processes here."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import typer

from conan_jax.cli.config import ConfigArgument, SetOption

app = typer.Typer(help="Jobs for GKE (JobSet), SLURM and Cloud TPU VMs; several processes on this machine.",
                  no_args_is_help=True, rich_markup_mode="rich")

FolderArgument = typer.Argument(help="A rendered folder.", metavar="DIR")


@app.command("render")
def render(
    config: str = ConfigArgument,
    target: str = typer.Option(..., "--target", help="gke-jobset, slurm, tpu-vm (queued resources: legacy) or local."),
    accelerator: str = typer.Option(..., "--accelerator", help="Quota name or topology: v6e-256, v5e:16x16, h100-64, cpu-8."),
    out: Path = typer.Option(..., "--out", help="The folder to write."),
    slices: int = typer.Option(1, "--slices", help="Number of TPU slices, connected by the data-centre network."),
    chips_per_host: int = typer.Option(None, "--chips-per-host",
        help="Chips of one host, for v5e-8 and v6e-8 (8 or 4) and for CPU devices."),
    overrides: list[str] = SetOption,
    stage: str = typer.Option(None, "--stage", help="Train this stage only."),
    name: str = typer.Option(None, "--name", help="Name of the job [default: that of the recipe]."),
    python: str = typer.Option("python", "--python", help="Path of the Python interpreter in the job."),
    working_dir: str = typer.Option(None, "--working-dir", help="Folder that contains CONFIG, in the image or on the machines."),
    image: str = typer.Option(None, "--image", help="Container image (gke-jobset)."),
    namespace: str = typer.Option(None, "--namespace", help="Namespace (gke-jobset)."),
    output_claim: str = typer.Option(None, "--output-claim", help="PersistentVolumeClaim, ReadWriteMany, for the run (gke-jobset)."),
    output_mount: str = typer.Option("/output", "--output-mount", help="Mount path of the claim in the pods (gke-jobset)."),
    queue: str = typer.Option(None, "--queue", help="Kueue's LocalQueue (gke-jobset), or partition (slurm)."),
    account: str = typer.Option(None, "--account", help="Account to charge (slurm)."),
    service_account: str = typer.Option(None, "--service-account",
        help="Service account of Kubernetes (gke-jobset) or Google Cloud (tpu-vm)."),
    sbatch: list[str] = typer.Option([], "--sbatch", metavar="OPTION=VALUE",
        help="Option of sbatch, for example cpus-per-task=12 or qos=high (slurm)."),
    node_selector: list[str] = typer.Option([], "--node-selector", metavar="LABEL=VALUE",
                                            help="Label of the nodes, for example cloud.google.com/gke-spot=true (gke-jobset)."),
    tolerations: list[str] = typer.Option([], "--toleration", metavar="TAINT[=VALUE]", help="Taints of nodes to accept (gke-jobset)."),
    cpu: str = typer.Option(None, "--cpu", help="CPUs of a pod, for example 96 (gke-jobset)."),
    memory: str = typer.Option(None, "--memory", help="Memory of a pod, for example 160Gi (gke-jobset)."),
    project: str = typer.Option(None, "--project", help="Google Cloud project (tpu-vm)."),
    zone: str = typer.Option(None, "--zone", help="Google Cloud zone (tpu-vm)."),
    environment: list[str] = typer.Option([], "--env", metavar="NAME",
        help="Environment variable of the job; its value is not written into the manifest."),
    secret: str = typer.Option(None, "--secret", help="Secret with the values of --env (gke-jobset)."),
    time_limit: int = typer.Option(None, "--time-limit", help="Minutes that one attempt may take (gke-jobset, slurm)."),
    grace: int = typer.Option(300, "--grace", help="Seconds between SIGTERM and the kill (gke-jobset, slurm)."),
    max_restarts: int = typer.Option(20, "--max-restarts",
        help="Maximum number of restarts after exit codes other than 0 and 78 (not for local)."),
) -> None:
    """Write the manifest of a job, and launch.json, which `check` and `submit` read.

    Examples:

        conan launch render configs/conan_v2.py --target gke-jobset --accelerator v6e-256 --slices 2 --stage pretrain --out pod \\
            --image europe-docker.pkg.dev/my-project/conan/conan:1 --output-claim runs --queue tpu --env CONAN_DATA --secret conan

        conan launch render configs/conan_v2.py --target slurm --accelerator h100-64 --queue gpu --sbatch cpus-per-task=12 --out job

        conan launch render configs/demo.py:tiny --target local --accelerator cpu-8 --chips-per-host 2 --out here
    """
    from conan_jax import config_io, launch

    run = config_io.load_run(config, overrides)
    if stage is not None:
        run.stage(stage)
    spec = launch.LaunchSpec(
        target=target, name=_job_name(run.name) if name is None else name, config=config, accelerator=accelerator,
        overrides=tuple(overrides), stage=stage, slices=slices, chips_per_host=chips_per_host, python=python, working_dir=working_dir,
        image=image, namespace=namespace, output_claim=output_claim, output_mount=output_mount, queue=queue, account=account,
        service_account=service_account, project=project, zone=zone, environment=tuple(environment), secret=secret,
        sbatch=tuple(sbatch), node_selector=tuple(node_selector), tolerations=tuple(tolerations), cpu=cpu, memory=memory,
        time_limit_minutes=time_limit, grace_seconds=grace, max_restarts=max_restarts,
    )
    for file in launch.write(spec, out):
        typer.echo(str(file))
    if target == "tpu-vm":
        typer.echo("queued resources are the older way to get TPUs; where there is a cluster, prefer --target gke-jobset", err=True)


@app.command("check")
def check(
    folder: Path = FolderArgument,
    as_json: bool = typer.Option(False, "--json", help='{"ok": ..., "findings": [{"rule", "message", "serious"}]}'),
) -> None:
    """Check a rendered folder offline against schemas and its recipe. Exit code 78 when a check fails.

    Rules: recipe, schema, kubernetes, shell, names, devices, mesh, batch, memory, grace, restarts, signal, privileges, output.

    Examples:

        conan launch check pod

        conan launch check pod --json
    """
    import dataclasses

    from conan_jax import launch
    from conan_jax.errors import EXIT_BAD_INPUT

    findings = launch.check(folder)
    ok = not any(finding.serious for finding in findings)
    if as_json:
        typer.echo(json.dumps({"ok": ok, "findings": [dataclasses.asdict(f) for f in findings]}, indent=2, ensure_ascii=False))
    else:
        for finding in findings:
            typer.echo(f"{'wrong' if finding.serious else 'note'}  {finding.rule}: {finding.message}")
        notes = len(findings)
        fine = f"nothing wrong{f', {notes} to note' if notes else ''}"
        typer.echo(f"{folder}: {fine if ok else 'not fit to be submitted'}")
    if not ok:
        raise typer.Exit(EXIT_BAD_INPUT)


@app.command("submit")
def submit(
    folder: Path = FolderArgument,
    dry_run: bool = typer.Option(False, "--dry-run", help="Print the command and run nothing."),
) -> None:
    """Check a rendered folder, then print and run the command that submits it.

    Examples:

        conan launch submit pod --dry-run

        conan launch submit pod
    """
    import subprocess

    from conan_jax import launch
    from conan_jax.errors import ConfigError

    wrong = [f"{finding.rule}: {finding.message}" for finding in launch.check(folder) if finding.serious]
    if wrong:
        raise ConfigError(f"{folder} is not fit to be submitted. " + " | ".join(wrong))
    command = launch.submit_command(launch.read(folder), folder)
    typer.echo(shlex.join(command))
    if dry_run:
        return
    try:
        code = subprocess.run(command, check=False).returncode
    except FileNotFoundError as error:
        raise ConfigError(f"{command[0]} is not installed on this machine; run the command above where it is") from error
    raise typer.Exit(code)


def _job_name(run_name: str) -> str:
    """A run's name as a label: lower case, '-' for what a label may not hold."""
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in run_name.lower()).strip("-")


def _mount() -> None:
    from conan_jax.cli import launch_local

    app.command("local")(launch_local.local)


_mount()
