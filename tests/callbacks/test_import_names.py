"""Lightning is imported as ``lightning.pytorch`` or as ``pytorch_lightning``, whose classes are others."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("import_name.py")


def run(name):
    command = [sys.executable, str(SCRIPT), name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_both_names_give_the_same_run_to_the_bit_and_the_same_refusals():
    first, second = run("lightning.pytorch"), run("pytorch_lightning")
    assert first == second
    assert len(first[-1]) == 2
    assert first[0] != first[1]
