"""`python -m bench …`: see --help."""

from __future__ import annotations

import argparse
import importlib
import sys
from importlib.util import find_spec

COMMANDS = {
    "step": "a whole training step on the CPU, beside its encoder product and the naive dense step",
    "wide": "TrainStep on the CPU against the width of the dictionary: time and memory",
    "quality": "what small optimizer states cost in explained variance",
    "dead": "what evaluating dead latents in some steps only saves and costs",
    "survey": "the one pass over all features, beside harvesting and encoding; its memory",
    "site": "the site of a wide dictionary and its server: size, times in a browser, memory",
    "compile": "compile every kernel for every GPU it is meant for, without a GPU",
    "gpu": "check and time kernels and steps on an NVIDIA GPU",
    "memory": "the peak memory of training runs on the CPU, beside what fastsae.estimate says",
    "demo": "keep the figures of a finished demo",
    "readme": "write the tables of README.md from bench/results",
    "all": "step and compile, and gpu where there is one",
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Timing and compiling.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    for name, about in COMMANDS.items():
        sub = commands.add_parser(name, help=about, description=about)
        # Only the module that is asked for is imported; with --help for all of them none is.
        if name != "all" and name in argv[:1]:
            importlib.import_module(f"bench.{name}").add_arguments(sub)
    args = parser.parse_args(argv)
    if args.command == "all":
        return _all()
    return importlib.import_module(f"bench.{args.command}").main(args)


def _all() -> int:
    import torch

    wanted = ["step"]
    if find_spec("triton") is not None:
        wanted.append("compile")
    if torch.cuda.is_available():
        wanted.append("gpu")
    failed = 0
    for command in wanted:
        print(f"-- {command}: {COMMANDS[command]}", flush=True)
        failed |= main([command])
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
