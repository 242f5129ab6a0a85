"""Options that several verbs of the command line share."""

from pathlib import Path
from typing import Annotated

import typer

SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a key of the recipe. Repeatable."),
]
RecipeOption = Annotated[
    Path, typer.Option("--config", help="Recipe: a TOML file, or a name such as ssd300.", show_default=False)
]
DataOption = Annotated[Path, typer.Option("--data", help="Data folder in COCO's layout.", show_default=False)]
OwnConfigOption = Annotated[
    Path | None, typer.Option("--config", help="Recipe (TOML) in place of the checkpoint's own.", show_default=False)
]
CheckpointOption = Annotated[
    Path, typer.Option("--checkpoint", help="Checkpoint, or weights of the MLPerf reference.", show_default=False)
]
AnnotationsOption = Annotated[
    Path | None,
    typer.Option(
        help="COCO JSON with class names, for weights without names whose classes are not COCO's.", show_default=False
    ),
]
RecipeFolderOption = Annotated[
    Path | None,
    typer.Option(help="Folder with the recipes of the cluster, in place of the program's.", show_default=False),
]
