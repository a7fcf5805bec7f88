"""``bdense``: train a small teacher, distil a student, draw from it, measure it."""

import argparse
import sys
from collections.abc import Sequence

from bdense.command import Verbs, new_parser, run_verb


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; 0 done, 1 failed, 2 a mistake of the user's, 130 interrupted."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    if argv[:1] == ["--version"]:
        _command()[0].parse_args(argv)  # ends here, before the verbs import torch
    options = _parser().parse_args(argv)

    def call() -> None:
        from bdense.verbs.common import use_device

        use_device(options)
        options.run(options)

    return run_verb(
        "bdense",
        call,
        on_interrupt="interrupted; run the same command again to continue from the last "
        "checkpoint",
    )


def _parser() -> argparse.ArgumentParser:
    from bdense.verbs.distill import add_distill
    from bdense.verbs.drawing import add_fid, add_sample
    from bdense.verbs.files import add_convert, add_reference
    from bdense.verbs.progressive import add_progressive
    from bdense.verbs.teacher import add_teacher

    parser, verbs = _command()
    for add in (
        add_teacher,
        add_distill,
        add_progressive,
        add_sample,
        add_fid,
        add_reference,
        add_convert,
    ):
        add(verbs)
    return parser


def _command() -> tuple[argparse.ArgumentParser, Verbs]:
    return new_parser(
        "bdense",
        "Few-step students of diffusion teachers, plain or with B-DENSE.",
        "bdense teacher --data digits --kimg 250 --out teacher.safetensors",
    )


if __name__ == "__main__":
    sys.exit(main())
