"""`conan config show`: the whole of a recipe, after overrides."""

from __future__ import annotations

import json

import typer

app = typer.Typer(help="Show configurations.", no_args_is_help=True, rich_markup_mode="rich")

ConfigArgument = typer.Argument(help="A configuration file, or FILE:tiny for its small variant.", metavar="CONFIG")
SetOption = typer.Option([], "--set", metavar="KEY=VALUE", help="Override one value; may be given many times.")


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
