"""Imports go down only, and the core knows no Lightning. Each check is also shown to fail when broken."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lightning_qat"
LEVELS = {
    "core": 0,
    "observers": 1,
    "estimators": 1,
    "schedules": 1,
    "records": 1,
    "charts": 2,
    "files": 1,
    "ptq": 2,
    "exporters": 2,
    "nn": 3,
    "api": 4,
    "exporting": 4,
    "callbacks": 4,
    "tasks": 4,
    "tracking": 5,
    "cli": 6,
}
OUTSIDE = {"__init__", "conf", "recipes"}  # the lazy public face, and configuration
WITHOUT_LIGHTNING = [name for name, level in LEVELS.items() if level <= 3] + ["api"]


def imported_parts(path):
    """Yield the parts of the package that a file imports, at the top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            parts = name.split(".")
            if parts[0] == "lightning_qat" and len(parts) > 1:
                yield parts[1]


def violations(package):
    found = []
    for path in sorted(package.rglob("*.py")):
        own = path.relative_to(package).parts[0].removesuffix(".py")
        if own in OUTSIDE:
            continue
        for part in imported_parts(path):
            if part != own and LEVELS[part] >= LEVELS[own]:
                found.append(f"{path.name}: {own} (level {LEVELS[own]}) imports {part} (level {LEVELS[part]})")
    return found


def test_every_part_has_a_level():
    parts = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.suffix in ("", ".py")}
    assert parts - {"__pycache__"} == set(LEVELS) | OUTSIDE


def test_imports_go_down_only():
    assert violations(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("core/grid.py", "from lightning_qat.observers import OBSERVERS"),
        ("observers/mse.py", "import lightning_qat.estimators"),
        ("nn/convert.py", "def late():\n    from lightning_qat.callbacks import QATCallback"),
        ("records.py", "from lightning_qat import nn"),
    ],
)
def test_an_import_that_goes_up_is_noticed(file, line, tmp_path):
    copied = tmp_path / "lightning_qat"
    shutil.copytree(PACKAGE, copied)
    with (copied / file).open("a") as target:
        target.write(f"\n{line}\n")
    assert len(violations(copied)) >= 1


SCRIPT = """
import importlib, sys
for part in {parts}:
    importlib.import_module("lightning_qat." + part)
loaded = [name for name in sys.modules if name.split(".")[0] in ("lightning", "pytorch_lightning", "lightning_fabric")]
sys.exit(f"pulled in {{loaded[:3]}}" if loaded else 0)
"""


def import_in_subprocess(root):
    script = SCRIPT.format(parts=WITHOUT_LIGHTNING)
    return subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False)


def test_core_modules_and_api_pull_in_no_lightning():
    done = import_in_subprocess(PACKAGE.parent)
    assert done.returncode == 0, done.stderr


def test_pulling_in_lightning_is_noticed(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "lightning_qat")
    with (tmp_path / "lightning_qat/observers/mse.py").open("a") as target:
        target.write("\nimport lightning.fabric\n")
    done = import_in_subprocess(tmp_path)
    assert done.returncode == 1
    assert "pulled in ['lightning" in done.stderr


def test_the_public_face_is_lazy_and_complete():
    import lightning_qat

    assert sorted(lightning_qat.__all__) == sorted(lightning_qat._PUBLIC)
    for name in lightning_qat.__all__:
        assert getattr(lightning_qat, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'QATCallbak'"):
        _ = lightning_qat.QATCallbak
