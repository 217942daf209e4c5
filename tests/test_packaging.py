"""The wheel holds everything, and runs outside the checkout."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("lightning_qat-*.whl"))


def test_wheel_holds_configuration_recipes_and_types(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("conf", "recipes"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".yaml") and "recipe/" not in path.as_posix():
                assert f"lightning_qat/{path.relative_to(ROOT).as_posix()}" in names
    assert "lightning_qat/conf/recipe/tiny_lm.yaml" in names
    assert "lightning_qat/py.typed" in names
    assert not {name for name in names if name.startswith(("tests", "conf", "recipes"))}
    entry_points = next(name for name in names if name.endswith("entry_points.txt"))
    assert b"lightning-qat = lightning_qat.cli.main:main" in zipfile.ZipFile(wheel).read(entry_points)


def test_command_line_runs_from_the_wheel_outside_the_checkout(wheel, tmp_path):
    """In a venv that sees the packages of this one, and the wheel, but not the checkout."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    site = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    zipfile.ZipFile(wheel).extractall(site)
    dependencies = [path for path in sys.path if path.endswith("site-packages")]
    # Plain entries, not site directories: the .pth of an editable install would lead back to the checkout.
    (site / "dependencies.pth").write_text("\n".join(dependencies))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}

    def call(*arguments):
        done = subprocess.run(
            [str(python), *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    assert str(site) in call("-c", "import lightning_qat; print(lightning_qat.__file__)")
    small = ["base.trainer.max_steps=2", "finetune.trainer.max_steps=4", "data.stride=4096", "logger=none"]
    call("-m", "lightning_qat.cli.main", "compare", "recipe=tiny_lm", "hydra.run.dir=out", *small)
    assert (tmp_path / "out" / "quality_vs_bits.png").exists()
