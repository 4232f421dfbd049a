"""Commands as a person can type them: this environment's `conan`, with paths quoted for a shell."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path


def shown_command() -> str:
    """`conan`, or its path when a shell would not find this environment's command."""
    here = Path(sys.executable).with_name("conan")
    found = shutil.which("conan")
    if not here.exists() or (found is not None and Path(found).samefile(here)):
        return "conan"
    return shlex.quote(str(here.relative_to(Path.cwd())) if here.is_relative_to(Path.cwd()) else str(here))


def next_steps(run_folder: Path, searches: bool = False) -> str:
    """The commands that use a trained run, a line each. `searches`: the run holds an index of its own."""
    conan, run = shown_command(), shlex.quote(str(run_folder))
    elsewhere = "" if run_folder == Path("runs/demo") else f" --run {run}"
    search = f'"how do I ..."{elsewhere}' if searches else f'"..." --corpus OUT.npy --documents IN.jsonl --model {run}'
    commands = {"encode": f"IN.jsonl OUT.npy --model {run}", "search": search, "eval": f"{run} --suite FOLDER",
                "export": f"{run} exports/{shlex.quote(run_folder.name)}", "report": run}
    return "next:\n" + "\n".join(f"  {conan} {name} {arguments}" for name, arguments in commands.items())
