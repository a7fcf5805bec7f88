"""``bdense``: train a small teacher, distil a student, draw from it, measure it."""

import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from bdense import command
from bdense.command import Force, Verb, kept_in, run_verb
from bdense.errors import StoppedError
from bdense.execution import Execution
from bdense.files import UNFINISHED
from bdense.metrics.settings import MetricSettings
from bdense.verbs.options import (
    Cache,
    ConvertOptions,
    Drawing,
    Evaluation,
    ExportOptions,
    Features,
    FidOptions,
    Hardware,
    RecombineOptions,
    RecordedHardware,
    ReferenceOptions,
    SampleOptions,
    VerifyOptions,
    distill_configs,
    methods_with,
    teacher_configs,
)

VERBS = {
    "teacher": Verb(
        help="train a small teacher",
        example="bdense teacher --data digits --kimg 250 --out teacher.safetensors",
        function="bdense.verbs.teacher:teacher",
        configs=teacher_configs,
    ),
    "distill": Verb(
        help="distil a few-step student, plain or with B-DENSE, by the method that --method names",
        example="bdense distill teacher.safetensors --nfe 2 --a 1.386 --out student.safetensors",
        function="bdense.verbs.distill:distill",
        configs=distill_configs,
        elsewhere=methods_with,
    ),
    "recombine": Verb(
        help="combine the branches of a student as sum_k c_k D^k, at no cost in sampling; c is "
        "given, or searched by FID",
        example="bdense recombine student.branches.safetensors --extractor digits-classifier "
        "--images 4096 --out combined.safetensors",
        function="bdense.verbs.recombine:recombine",
        configs=(RecombineOptions, Force, Evaluation, Execution, Hardware),
    ),
    "sample": Verb(
        help="draw images from a student (or a teacher, with --nfe and so on) as one PNG",
        example="bdense sample student.safetensors --images 64 --out samples.png",
        function="bdense.verbs.sample:sample",
        configs=(SampleOptions, Force, Drawing, Execution, Hardware),
    ),
    "fid": Verb(
        help="measure a model's FID, and more, and print it with its conditions as JSON",
        example="bdense fid student.safetensors --data digits --extractor digits-classifier "
        "--images 4096",
        function="bdense.verbs.fid:fid",
        configs=(FidOptions, Features, MetricSettings, Drawing, Execution, Hardware),
    ),
    "verify": Verb(
        help="draw a student's images again from its recorded seeds and measure their FID under "
        "the recorded conditions: equal, within rounding or different (exit status 1)",
        example="bdense verify model",
        function="bdense.verbs.verify:verify",
        configs=(VerifyOptions, RecordedHardware),
    ),
    "reference": Verb(
        help="write a data set's statistics as EDM's .npz (mu, sigma)",
        example="bdense reference --data digits --extractor digits-classifier --out digits.npz",
        function="bdense.verbs.fid:reference",
        configs=(ReferenceOptions, Force, Features, Hardware),
    ),
    "convert": Verb(
        help="write a foreign checkpoint as safetensors, with readable JSON and a model card "
        "beside it",
        example="bdense convert edm-cifar10-32x32-uncond-vp --out teacher.safetensors",
        function="bdense.verbs.convert:convert",
        configs=(ConvertOptions, Force),
    ),
    "export": Verb(
        help="write a student of a diffusers teacher as a folder that diffusers loads "
        "without bdense; with --push, upload any student as a model folder",
        example="bdense export student.safetensors --pipeline stable-diffusion --out pipeline",
        function="bdense.verbs.export:export",
        configs=(ExportOptions, Cache, Hardware),
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; 0 done, 1 failed, 2 a mistake of the user's, 130 interrupted."""
    argv = list(sys.argv[1:] if arguments is None else arguments)

    def call() -> None:
        options = make_parser(argv).parse_args(argv)
        try:
            options.run(options)
        except KeyboardInterrupt:
            if argv[0] not in ("teacher", "distill"):
                raise
            raise StoppedError(f"interrupted; {_kept(Path(options.out))}") from None

    # As Ctrl-C: what is under way is removed, or saved.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    return run_verb("bdense", call, on_interrupt="interrupted; nothing was saved")


def _kept(out: Path) -> str:
    """What a training of that output continues from, if it ended where it could not be saved."""
    for unfinished in (out.with_suffix(UNFINISHED), *sorted(out.glob(f"*{UNFINISHED}"))):
        if unfinished.exists():
            return kept_in(unfinished)
    return "finished students are kept" if out.is_dir() else "nothing was saved"


def make_parser(arguments: Sequence[str]) -> command.Parser:
    """The command's parser, with the options of the verb that these arguments name.

    Raises:
        InputError: They ask for a method that does not exist.
    """
    description = "Few-step students of diffusion teachers, plain or with B-DENSE."
    return command.make_parser("bdense", description, VERBS, arguments)
