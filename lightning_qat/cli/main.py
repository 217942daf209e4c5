"""Dispatches ``lightning-qat <command>`` to its Hydra app."""

from __future__ import annotations

import sys
from importlib import import_module

from lightning_qat.cli.explain import MISUSED, nearest

COMMANDS = {
    "train": "Fine-tune a recipe with quantization-aware training.",
    "compare": "Compare QAT with quantization after training, at every width and seed; goes on where it stopped.",
    "sweep": "Train for every combination of overrides such as callbacks.qat.scheme=w4,w3, and compare the results.",
    "export": "Write what a run trained to files that are deployed, and check that they hold it.",
    "plot": "Draw the table and the quality-vs-bits figure of files of results.",
}
_USAGE = """usage: lightning-qat <command> [overrides]

{commands}

lightning-qat <command> --help shows the configuration that overrides change. --trust PACKAGE lets a configuration call
what is in a package of yours. Exit codes: 0 done, 1 a run failed, 2 the command or its configuration is wrong, 130
interrupted."""


def main() -> int:
    """Run a command, and return its exit code."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in COMMANDS:
        code: int = import_module(f"lightning_qat.cli.{name}").main(arguments)
        return code
    if name == "--version":
        print(f"lightning-qat {import_module('lightning_qat').__version__}")
        return 0
    usage = _USAGE.format(commands="\n".join(f"  {command:9}{text}" for command, text in COMMANDS.items()))
    if name in ("-h", "--help"):
        print(usage)
        return 0
    print(f"{usage}\n\nThere is no command {name!r}. {nearest(name, COMMANDS)}", file=sys.stderr)
    return MISUSED


if __name__ == "__main__":
    sys.exit(main())
