"""``bdense-search`` and ``python -m search``; as ``bdense.__main__``."""

import sys


def main() -> int:
    """The command's exit status, see ``search.cli``."""
    try:
        from search import cli

        return cli.main()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
