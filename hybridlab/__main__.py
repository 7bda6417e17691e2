"""`hybridlab` and `python -m hybridlab`: the command line."""

import sys


def main() -> int:
    """Load the command line and run it; Ctrl-C meanwhile gives one line as well."""
    try:
        from hybridlab.cli import main as run

        return run()
    except KeyboardInterrupt:
        print("hybridlab: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
