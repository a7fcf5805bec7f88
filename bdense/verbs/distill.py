"""``bdense distill``: a few-step student, or several NFE's, or a student of a student."""

import argparse
from pathlib import Path
from typing import Any

from bdense.command import Verbs
from bdense.diffusion.step_condition import STARTS
from bdense.errors import InputError
from bdense.knobs import knobs_of
from bdense.methods.distill import distill
from bdense.methods.method import Inputs, StagePlan
from bdense.methods.sfd import SFD, SFDConfig
from bdense.models.cards import inherited, write_card
from bdense.models.sources import load_model
from bdense.models.store import save_denoiser
from bdense.training.loop import IterationReport
from bdense.verbs.common import (
    Progress,
    add_execution_options,
    add_model,
    add_out,
    chosen_execution,
    computing_verb,
    require_file_name,
    unfinished,
)
from bdense.verbs.grid_options import (
    add_grid_options,
    add_solver_options,
)
from bdense.weights.spaces import RULES, LogLinearWeights
from bdense.weights.weighting import BranchWeighting, FixedWeights, LearnedWeights

PERCEPTUAL = ("lpips", "lpips-sfd")


def add_distill(verbs: Verbs) -> None:
    """The verb and its options."""
    parser = computing_verb(
        verbs,
        "distill",
        "distil a few-step student with SFD, plain or B-DENSE",
        "bdense distill teacher.safetensors --nfe 2 --a 1.386 --out student.safetensors",
        _distill,
    )
    add_model(parser, "teacher")
    parser.add_argument(
        "--method",
        choices=("sfd", "sfd-bdense"),
        default="sfd-bdense",
        help="plain SFD, or with branches",
    )
    parser.add_argument(
        "--second-stage",
        action="store_true",
        help="TEACHER is a student itself; distil its steps into fewer",
    )

    def add(flag: str, what: str, default: str, **kwargs: Any) -> None:  # noqa: ANN401
        # Absent where not given: what is usual depends on the other options.
        what += f" (default: {default})"
        parser.add_argument(flag, default=argparse.SUPPRESS, help=what, **kwargs)

    add("--a", "slope of the branch weights, log w_k = a k + b", "0", type=float)
    add("--b", "offset of the branch weights, log w_k = a k + b", "0", type=float)
    add(
        "--learn",
        f"learn the branch weights while training, by the rule {' or '.join(RULES)}",
        "fixed by --a and --b",
        metavar="RULE",
    )
    add(
        "--strength",
        "exponent of --learn's rule: 0 is uniform, below 0 the reverse",
        "1",
        type=float,
    )
    add_grid_options(parser, distilled=True)
    add(
        "--step-condition",
        "where a student for several NFE starts: as its teacher, or with random layers for the "
        "number of steps, as the reference does",
        STARTS[0],
        choices=STARTS,
    )
    add(
        "--substeps",
        "steps that the teacher takes in each of the student's",
        "4; 3 with --second-stage",
        metavar="K",
        type=int,
    )
    add_solver_options(
        parser,
        default="dpmpp; euler with --second-stage",
        what="solver that the teacher walks with",
    )
    add(
        "--kimg",
        "training length in thousands of images",
        "200; 800 for several NFE; 2000 with --second-stage",
        type=float,
    )
    parser.add_argument(
        "--batch", metavar="N", type=int, default=128, help="images in each iteration"
    )
    add(
        "--lr",
        "Adam's step size; a tenth of it in the second half",
        "5e-05; 0.0005 with --second-stage",
        type=float,
    )
    parser.add_argument(
        "--dropout",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="train with the teacher's own dropout",
    )
    add(
        "--perceptual",
        "add the LPIPS between the ends of the last interval to the loss (needs the extra lpips, "
        "and 0.5 GB of weights); lpips feeds it images in [0, 1], which it expects, lpips-sfd in "
        "[-1, 1], as the reference does",
        "none",
        choices=PERCEPTUAL,
    )
    add_execution_options(parser)
    add_out(parser, "safetensors file to write")


def _distill(options: argparse.Namespace) -> None:
    given, execution = vars(options), chosen_execution(options)
    require_file_name(options.out)
    teacher, known = load_model(options.teacher)
    method = SFD()
    chosen = {name: given[name] for name in knobs_of(SFDConfig) if name in given}
    if options.second_stage:
        chosen = method.usual(known) | chosen
    config = SFDConfig.read(chosen)
    teacher.to(options.device).execute(execution)
    show, scratch = Progress(), unfinished(options.out)

    def on_iteration(_: StagePlan, done: IterationReport) -> None:
        show(done.iteration + 1, done.iterations, f"loss {done.loss:.4g}")

    (done,) = distill(
        method,
        teacher,
        config,
        lambda: _weighting(options, config.substeps),
        Inputs(seed=options.seed, known=known),
        checkpoint=scratch,
        metadata=inherited(known, Path(options.teacher).name),
        on_iteration=on_iteration,
    )
    save_denoiser(options.out, done.student, done.metadata)
    write_card(options.out, done.student, done.metadata)
    scratch.unlink(missing_ok=True)
    print(f"{options.out} NFE {' '.join(map(str, config.several_nfe))}")


def _weighting(options: argparse.Namespace, substeps: int) -> BranchWeighting:
    """Given, or learned, for the method's number of branches."""
    given = {
        name: value
        for name, value in vars(options).items()
        if name in ("a", "b", "learn", "strength")
    }
    spelt = " ".join(f"--{name} {value}" for name, value in given.items())
    if options.method == "sfd":
        if any(given.values()):
            raise InputError(
                f"--method sfd has one output and no branch weights, got {spelt}; drop that or "
                "use --method sfd-bdense"
            )
        return FixedWeights(LogLinearWeights(a=0.0)(1))
    if "learn" not in given:
        if "strength" in given:
            raise InputError(
                f"--strength is of weights that are learned, got {spelt}; add --learn "
                f"{' or --learn '.join(RULES)}, or drop it"
            )
        a, b = given.get("a", 0.0), given.get("b", 0.0)
        # LogLinearWeights refuses a K below 1 as the grid has done.
        return FixedWeights(LogLinearWeights(a=a, b=b)(substeps))
    if "a" in given or "b" in given:
        raise InputError(
            f"--learn sets the branch weights that --a and --b would give, got {spelt}; drop one"
        )
    return LearnedWeights(substeps, rule=given["learn"], strength=given.get("strength", 1.0))
