"""Dispatches ``lightning-qat <command>`` to its Hydra app."""

from __future__ import annotations

import sys
from importlib import import_module

COMMANDS = {
    "train": "Fine-tune a recipe with quantization-aware training.",
    "compare": "Compare QAT with round-to-nearest and the float control of a recipe, at every width.",
    "plot": "Draw the table and the quality-vs-bits figure of a results file.",
}


def main() -> int:
    """Run a command; return 0, or 2 if there is no such command."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        sys.argv = [f"{sys.argv[0]} {name}", *sys.argv[2:]]
        import_module(f"lightning_qat.cli.{name}").main()
        return 0
    if name == "--version":
        print(f"lightning-qat {import_module('lightning_qat').__version__}")
        return 0
    print("usage: lightning-qat <command> [overrides]; lightning-qat <command> --help shows the configuration\n")
    print("\n".join(f"  {command:10}{text}" for command, text in COMMANDS.items()))
    if name in ("-h", "--help"):
        return 0
    print(f"\nThere is no command {name!r}.", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
