"""`fastsae`, and `python -m fastsae`: the command line, with an answer to Ctrl-C while it is still being imported."""

import sys


def main() -> int:
    """Runs fastsae.cli.main; 130 after Ctrl-C."""
    try:
        from fastsae.cli import main as run

        return run()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
