"""The launches whose manifests are golden: every target on the accelerators that teams ask for first."""

from pathlib import Path

from conan_jax.launch import LaunchSpec, write

FOLDER = Path(__file__).parent.parent.parent / "launch" / "examples"
ACCELERATORS = {"v5e-256": 1, "v5p-256": 1, "v6e-256": 2, "h100-64": 1, "h100-8": 1}  # and slices
MORE = {
    "gke-jobset": dict(image="europe-docker.pkg.dev/my-project/conan/conan:1", working_dir="/app", output_claim="runs", queue="training",
                       namespace="research", service_account="trainer", environment=("CONAN_DATA",), secret="conan",
                       time_limit_minutes=1440),
    "slurm": dict(python=".venv/bin/python", working_dir="/home/me/conan_jax", queue="accelerators", account="research",
                  environment=("CONAN_DATA",), time_limit_minutes=1440),
    "tpu-vm": dict(python=".venv/bin/python", working_dir="/home/me/conan_jax", project="my-project", zone="us-east5-b"),
    "local": dict(python=".venv/bin/python"),
}


def example(target: str, accelerator: str, **changes) -> LaunchSpec:
    """The published recipe's first stage on `accelerator`. Under SLURM there is one slice."""
    fields = dict(target=target, name="conan-v2", config="configs/conan_v2.py", accelerator=accelerator, stage="pretrain",
                  slices=1 if target == "slurm" else ACCELERATORS.get(accelerator, 1))
    if accelerator.startswith("h100"):
        fields |= {"slurm": dict(sbatch=("cpus-per-task=12",)), "gke-jobset": dict(cpu="96", memory="800Gi")}.get(target, {})
    return LaunchSpec(**{**fields, **MORE[target], **changes})


def examples() -> dict[str, LaunchSpec]:
    """Golden folder -> launch. A TPU VM has no GPU."""
    return {f"{target}-{accelerator}": example(target, accelerator) for target in MORE for accelerator in ACCELERATORS
            if not (target == "tpu-vm" and accelerator.startswith("h100"))}


if __name__ == "__main__":  # rewrite the golden launches after a deliberate change: python -m tests.launch.examples
    for folder, spec in examples().items():
        write(spec, FOLDER / folder)
