"""The pages and drawings that follow from the code are current."""

import subprocess
import sys

import typer
from repository import REPOSITORY

from ssd_fast.__main__ import app
from ssd_fast.config.sections import Config

GENERATE = REPOSITORY / "docs" / "generate.py"


def test_generated_pages_and_drawings_are_current() -> None:
    checked = subprocess.run([sys.executable, GENERATE, "--check"], capture_output=True, text=True, timeout=300)

    assert checked.returncode == 0, checked.stderr


def test_every_verb_has_its_section() -> None:
    page = (REPOSITORY / "docs" / "cli.md").read_text(encoding="utf-8")
    verbs = list(typer.main.get_group(app).commands)

    assert len(verbs) >= 10
    assert [verb for verb in verbs if f"\n## {verb}\n" not in page] == []


def test_every_recipe_key_is_explained() -> None:
    unexplained = [
        f"{section}.{key}"
        for section, values in Config()
        for key, field in type(values).model_fields.items()
        if not field.description
    ]

    assert not unexplained


def test_drawing_of_the_rooms_names_every_package() -> None:
    drawing = (REPOSITORY / "docs" / "images" / "rooms.svg").read_text(encoding="utf-8")
    packages = [file.parent.name for file in REPOSITORY.glob("ssd_fast/*/__init__.py")]

    assert packages
    assert [name for name in (*packages, "kernels", "dali_pipelines") if f">{name}<" not in drawing] == []
