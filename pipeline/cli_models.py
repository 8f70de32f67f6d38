"""`slidecube models`: networks and rules, where they lie, and how they come and go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

_MEANINGS = ("logit", "probability", "classes")


@click.group()
def models() -> None:
    """List, show, import, export and verify models."""


_workspace = click.option(
    "--workspace", metavar="PLACE", help="Look into this workspace, too: a folder or s3://bucket/prefix."
)
_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@models.command("list")
@_workspace
@_as_json
def models_list(*, workspace: str | None, as_json: bool) -> None:
    """List the models of all places."""
    from slidecube.pipeline.model_summaries import list_text, listed

    rows = listed(workspace)
    click.echo(json.dumps(rows, indent=2) if as_json else list_text(rows))


@models.command("show")
@click.argument("name")
@click.option("--all", "whole", is_flag=True, help="Print everything that the card says.")
@_workspace
@_as_json
def models_show(name: str, *, whole: bool, workspace: str | None, as_json: bool) -> None:
    """Print the card of a model: NAME, NAME@VERSION or a folder."""
    from slidecube.pipeline.model_summaries import short_text, shown, shown_text

    card = shown(name, workspace)
    text = shown_text if whole or ("weights" not in card and "members" not in card) else short_text
    click.echo(json.dumps(card, indent=2) if as_json else text(card))


@models.command("verify")
@click.argument("name", required=False)
@click.option("--all", "every", is_flag=True, help="Verify the networks of all places.")
@_workspace
def models_verify(name: str | None, *, every: bool, workspace: str | None) -> int:
    """Check cards and weights, load them, and compute one window."""
    from slidecube.pipeline.model_summaries import verified

    if (name is None) != every:
        raise click.UsageError("name one model, or say --all")
    code = 0
    for level, where, text in verified(name, workspace):
        click.echo(f"{level:<4}  {where}  {text}")
        code = 1 if level == "fail" else code
    return code


@models.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--card",
    type=click.Path(path_type=Path),
    help="A card.toml without [weights], in place of the options below.",
)
@click.option("--name", help="Name of the model: lower-case letters, digits, '-' and '_'.")
@click.option("--version", type=int, help="Its version; the next free one when left out.")
@click.option(
    "--architecture", help="Name of the architecture, as `slidecube models architectures` lists them."
)
@click.option(
    "--arguments", metavar="KEY=VALUE", multiple=True, help="Of the architecture; once for each of them."
)
@click.option("--features", metavar="A,B,...", help="Features that it reads, in order; or the name of a set.")
@click.option("--layer", "layers", metavar="NAME", multiple=True, help="A feature that is a [[layer]].")
@click.option("--mean", metavar="N,N,...", help="Means of the features, by which they were normalised.")
@click.option("--std", metavar="N,N,...", help="Standard deviations of the features.")
@click.option("--resolution-m", type=float, help="Side of the pixels that it was trained on; 10.")
@click.option("--window-px", type=int, help="Side of the windows that it computes; 128.")
@click.option("--margin-px", type=int, help="On each side of a window, blended into the next; 16.")
@click.option("--threshold", type=float, help="Probability from which a pixel is landslide.")
@click.option("--licence", help="Of the weights, such as CC-BY-4.0.")
@click.option("--description", help="What it was trained on, in a sentence.")
@click.option("--source", help="Where it comes from: an address or a paper.")
@click.option("--simulated", is_flag=True, help="It was trained on simulated scenes.")
@click.option(
    "--output",
    type=click.Choice(_MEANINGS),
    help="Of an ONNX: what it gives; classes are two maps of logits, the second of landslide.",
)
def models_import(file: Path, **said: Any) -> None:
    """Import a torch state dict, safetensors or ONNX.

    FILE ends with .pt, .pth, .ckpt, .safetensors or .onnx. Of a pickle only tensors are read.
    """
    from slidecube.pipeline.model_import import import_model, tables_of

    made = import_model(file, tables_of(file, **said), output=said["output"], layers=said["layers"])
    for line in made.told:
        click.echo(line)
    click.echo(
        f"imported {made.card.address} into {made.folder}; try it: slidecube models verify {made.card.address}"
    )


@models.command("export")
@click.argument("name")
@click.option("--out", type=click.Path(path_type=Path), help="Copy its folder to this new folder.")
@click.option("--onnx", "onnx_file", type=click.Path(path_type=Path), help="Write it as this ONNX file.")
@click.option(
    "--stac", "stac_file", type=click.Path(path_type=Path), help="Write its STAC item (MLM) as this file."
)
@_workspace
def models_export(
    name: str, *, out: Path | None, onnx_file: Path | None, stac_file: Path | None, workspace: str | None
) -> None:
    """Write a model for others: its folder, ONNX, or STAC item."""
    from slidecube.pipeline.model_import import export_model

    if out is None and onnx_file is None and stac_file is None:
        raise click.UsageError("say what to write: --out FOLDER, --onnx FILE or --stac FILE")
    for line in export_model(name, workspace, out=out, onnx_file=onnx_file, stac_file=stac_file):
        click.echo(line)


@models.command("architectures")
def models_architectures() -> None:
    """List the architectures and their arguments."""
    from slidecube.pipeline.model_summaries import architectures_text

    click.echo(architectures_text())
