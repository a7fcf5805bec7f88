"""``bdense``: train a small teacher, distil a student, draw from it, measure it."""

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bdense.command import add_verb, new_parser, run_verb
from bdense.errors import InputError
from bdense.execution import Execution
from bdense.knobs import add_options
from bdense.metrics.settings import MetricSettings
from bdense.verbs.options import (
    POSITIONALS,
    Configs,
    ConvertOptions,
    Drawing,
    Features,
    FidOptions,
    Hardware,
    ReferenceOptions,
    SampleOptions,
    distill_configs,
    teacher_configs,
    unknown_option,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verb:
    """A verb of the command; torch is loaded when it runs.

    Attributes:
        help: What it does, in one line.
        example: A call of it.
        function: What runs it, as module:name below ``bdense.verbs``.
        positional: Its argument without an option; empty for none.
        configs: The classes whose knobs are its options, for the arguments that follow the verb.
        skip: Knobs of these without an option.
    """

    help: str
    example: str
    function: str
    positional: str = ""
    configs: Callable[[Sequence[str]], Configs]
    skip: tuple[str, ...] = ()

    def add_options(self, parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
        """Add its options to a parser."""
        if self.positional:
            name = self.positional
            parser.add_argument(name, metavar=name.upper(), help=POSITIONALS[name])
        add_options(parser, *self.configs(arguments), skip=self.skip)

    def run(self, options: argparse.Namespace) -> None:
        """Import what runs the verb, and call it."""
        module, _, name = self.function.partition(":")
        getattr(importlib.import_module(f"bdense.verbs.{module}"), name)(options)


VERBS = {
    "teacher": Verb(
        help="train a small teacher",
        example="bdense teacher --data digits --kimg 250 --out teacher.safetensors",
        function="teacher:teacher",
        configs=teacher_configs,
    ),
    "distill": Verb(
        help="distil a few-step student, plain or with B-DENSE, by the method that --method names",
        example="bdense distill teacher.safetensors --nfe 2 --a 1.386 --out student.safetensors",
        function="distill:distill",
        positional="teacher",
        configs=distill_configs,
    ),
    "sample": Verb(
        help="draw images from a student (or a teacher, with --nfe and so on) as one PNG",
        example="bdense sample student.safetensors --images 64 --out samples.png",
        function="sample:sample",
        positional="model",
        configs=lambda _: (SampleOptions, Drawing, Execution, Hardware),
    ),
    "fid": Verb(
        help="measure a model's FID, and more, and print it with its conditions as JSON",
        example="bdense fid student.safetensors --data digits --extractor digits-classifier "
        "--images 4096",
        function="fid:fid",
        positional="model",
        configs=lambda _: (FidOptions, Features, MetricSettings, Drawing, Execution, Hardware),
        skip=("kid_subsets", "kid_seed"),
    ),
    "reference": Verb(
        help="write a data set's statistics as EDM's .npz (mu, sigma)",
        example="bdense reference --data digits --extractor digits-classifier --out digits.npz",
        function="fid:reference",
        configs=lambda _: (ReferenceOptions, Features, Hardware),
    ),
    "convert": Verb(
        help="write a foreign checkpoint as safetensors, with readable JSON and a model card "
        "beside it",
        example="bdense convert edm-cifar10-32x32-uncond-vp --out teacher.safetensors",
        function="convert:convert",
        positional="source",
        configs=lambda _: (ConvertOptions,),
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; 0 done, 1 failed, 2 a mistake of the user's, 130 interrupted."""
    argv = list(sys.argv[1:] if arguments is None else arguments)

    def call() -> None:
        parser = make_parser(argv)
        options, unknown = parser.parse_known_args(argv)
        if unknown and unknown[0].startswith("--") and argv[0] == "distill":
            raise InputError(unknown_option(unknown[0], argv))
        if unknown:
            parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        options.run(options)

    return run_verb(
        "bdense",
        call,
        on_interrupt="interrupted; run the same command again to continue from the last "
        "checkpoint",
    )


def make_parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The command's parser, with the options of the verb that these arguments name.

    Raises:
        InputError: They ask for a method that does not exist.
    """
    parser, verbs = new_parser(
        "bdense",
        "Few-step students of diffusion teachers, plain or with B-DENSE.",
        VERBS["teacher"].example,
    )
    for name, verb in VERBS.items():
        added = add_verb(verbs, name, verb.help, verb.example, verb.run)
        if [name] == list(arguments[:1]):
            verb.add_options(added, arguments[1:])
    return parser


if __name__ == "__main__":
    sys.exit(main())
