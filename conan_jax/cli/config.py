"""`conan config show`: the whole of a recipe, after overrides. `conan config list`: the variants of a recipe file."""

from __future__ import annotations

import json

import typer

app = typer.Typer(help="Show configurations.", no_args_is_help=True, rich_markup_mode="rich")

ConfigArgument = typer.Argument(
    help="A configuration file, or FILE:VARIANT; `conan config list FILE` shows its variants.", metavar="CONFIG")
SetOption = typer.Option(
    [], "--set", metavar="KEY=VALUE",
    help="Override one value, in any order and number: weak.steps=100. A new name adds a member, "
         "datasets.notes='{\"kind\": \"text\", \"source\": \"notes.txt\"}'; null drops one, stages.weak=null.")


@app.command("show")
def show(
    config: str = ConfigArgument,
    overrides: list[str] = SetOption,
    as_json: bool = typer.Option(False, "--json", help="One JSON object, with the exact number of parameters."),
) -> None:
    """Print every value of a recipe, one `key = value` a line, and its number of parameters.

    Examples:

        conan config show configs/conan_v2.py --json

        conan config show configs/demo.py --set weak.steps=100
    """
    from conan_jax import config_io
    from conan_jax.model import num_params

    run = config_io.load_run(config, overrides)
    parameters = num_params(run.model)
    if as_json:
        typer.echo(json.dumps({"parameters": parameters, **config_io.to_dict(run)}, indent=2, ensure_ascii=False))
    else:
        typer.echo(config_io.render(run), nl=False)
        typer.echo(f"# parameters: {parameters:,}")


@app.command("list")
def list_variants(file: str = typer.Argument(help="A configuration file.", metavar="FILE")) -> None:
    """Print the variants of a recipe file, each with a line about it.

    Examples:

        conan config list configs/demo.py
    """
    from conan_jax import config_io

    for name, text in config_io.variants(file).items():
        typer.echo(f"{file}:{name}" + (f"  {text}" if text else ""))
