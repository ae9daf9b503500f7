"""`export`: the trained models as plain directories of transformers."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from accel_gpt2.cli.options import DebugOption, JsonOption, RunArgument
from accel_gpt2.cli.output import print_json, print_table
from accel_gpt2.cli.run_directory import require_run
from accel_gpt2.units import format_bytes


def export(
    run_directory: RunArgument,
    output_dir: Annotated[
        Path | None,
        typer.Option(help="Where a folder for each class is made. [default: RUN/export]"),
    ] = None,
    class_name: Annotated[
        str | None,
        typer.Option("--class", metavar="NAME", help="Only this class. [default: all]"),
    ] = None,
    merge: Annotated[
        bool,
        typer.Option(
            help="Merge adapters into their base, dequantised first; or leave them alone, for peft."
        ),
    ] = True,
    dtype: Annotated[
        Literal["trained", "fp32", "bf16"],
        typer.Option(help="Of the weights; what is merged was trained in fp32."),
    ] = "trained",
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write the trained models for transformers, adapters merged.

    A folder for each class, with weights, configuration and tokenizer, which
    AutoModelForCausalLM.from_pretrained loads and which scores as the run does. What is there is
    never overwritten.
    """
    require_run(run_directory)
    from accel_gpt2.classify.export import export_run

    models = export_run(run_directory, output_dir, class_name=class_name, merge=merge, dtype=dtype)
    if json:
        print_json(
            {
                "models": [
                    {
                        "class_name": model.class_name,
                        "directory": str(model.directory),
                        "kind": model.kind,
                        "dtype": model.dtype,
                        "bytes": model.bytes,
                    }
                    for model in models
                ]
            }
        )
        return
    print_table(
        {"class": "left", "what": "left", "dtype": "left", "size": "right", "directory": "left"},
        [[x.class_name, x.kind, x.dtype, format_bytes(x.bytes), str(x.directory)] for x in models],
    )
