"""``bdense`` and ``python -m bdense``; Ctrl-C during its imports ends without a traceback."""

import sys


def main() -> int:
    """The command's exit status, see ``bdense.cli``."""
    try:
        from bdense import cli

        return cli.main()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
