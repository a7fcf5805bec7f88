"""Study files of the older forms, translated to today's.

There were two: searches of SFD's weights (``student``, ``budget``) and promotions to progressive
distillation (``chain``, ``round``).
"""

from typing import Any

from search.errors import SpecError

_SAMPLERS = {"tpe": "TPESampler", "gp": "GPSampler", "random": "RandomSampler"}


def translated(tree: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """A study's mapping in today's form, and a hint how to write it now; "" for today's form.

    Keys that neither form has are kept, to be refused by the parser.

    Raises:
        SpecError: A section of the old form is no mapping.
    """
    if "method" in tree or "plan" in tree:
        return tree, ""
    if "chain" in tree or "round" in tree:
        return _promotion(dict(tree)), (
            "this is the old form of a promotion; write `method: {name: progressive, ...}` for "
            "chain and round, and `plan: {arms: [...], seeds: [...]}` for study and seeds"
        )
    if "student" in tree or "budget" in tree:
        return _search(dict(tree)), (
            "this is the old form of a study; write `method: {name: sfd, ...}` for student and "
            "budget, `weights: {name: ...}` for parameterisation, and `plan: {trials: ...}` for "
            "budget.trials, sampler and pruning"
        )
    return tree, ""


def _section(tree: dict[str, Any], key: str) -> dict[str, Any]:
    """A section, taken out; empty where there is none."""
    section = tree.pop(key, None)
    if not isinstance(section, dict | None):
        raise SpecError(f"{key}: must be a mapping, got {section!r}")
    return dict(section or {})


def _search(tree: dict[str, Any]) -> dict[str, Any]:
    student, budget = _section(tree, "student"), _section(tree, "budget")
    plan: dict[str, Any] = {"replicates": 1}
    if "trials" in budget:
        plan["trials"] = budget.pop("trials")
    student.pop("method", None)
    if isinstance(name := student.get("solver"), str):
        student["solver"] = {"name": name}
    solver, levels = _section(student, "solver"), _levels(_section(student, "schedule"))
    if "name" in solver:
        solver["solver"] = solver.pop("name")
    method = {"name": "sfd", **student, **levels, **solver}
    plan |= _sampler(_section(tree, "sampler")) | _pruning(_section(tree, "pruning"))
    tree.pop("stop", None)
    if confirm := _section(tree, "confirm"):
        if (kimg := confirm.pop("kimg", None)) is not None:
            confirm["method"] = {"kimg": kimg}
        tree["confirm"] = confirm
    weights = tree.get("weights")
    if isinstance(weights, dict) and "parameterisation" in weights:
        kept = {key: value for key, value in weights.items() if key != "parameterisation"}
        tree["weights"] = {"name": weights["parameterisation"], **kept}
    return {**tree, "method": method | budget, "plan": plan}


def _levels(schedule: dict[str, Any]) -> dict[str, Any]:
    """A schedule's kind and numbers, as settings of the method."""
    if not schedule:
        return {}
    kept = {key: value for key, value in schedule.items() if key != "kind"}
    return {"schedule": schedule.get("kind", "polynomial"), **kept}


def _sampler(given: dict[str, Any]) -> dict[str, Any]:
    if not given:
        return {}
    name, startup = str(given.pop("name", "tpe")), given.pop("startup_trials", None)
    if startup is not None and name != "random":
        given["n_startup_trials"] = startup
    return {"sampler": {"name": _SAMPLERS.get(name, name), **given}}


def _pruning(given: dict[str, Any]) -> dict[str, Any]:
    """A pruner of the old form; a stored spec has all keys, unset ones as None."""
    name = given.pop("pruner", "none")
    startup = {"n_startup_trials": given.pop("startup_trials", None) or 5}
    percentile = {"percentile": given.pop("percentile", None) or 25.0}
    factor = {"reduction_factor": given.pop("factor", None) or 2}
    patience = {"patience": given.pop("patience", None) or 1}
    median = {"name": "MedianPruner", **startup}
    known: dict[str, dict[str, Any]] = {
        "median": median,
        "percentile": {"name": "PercentilePruner", **percentile, **startup},
        "successive-halving": {"name": "SuccessiveHalvingPruner", **factor},
        "hyperband": {"name": "HyperbandPruner", **factor},
        "patient-median": {"name": "PatientPruner", "wrapped_pruner": median, **patience},
    }
    plan = {key: value for key, value in given.items() if value}
    if isinstance(name, dict):
        plan["pruner"] = name
    elif name != "none":
        plan["pruner"] = known.get(str(name), {"name": name})
    return plan


def _promotion(tree: dict[str, Any]) -> dict[str, Any]:
    chain, update = _section(tree, "chain"), _section(tree, "round")
    renamed = {"first": "steps", "last": "until"}
    method: dict[str, Any] = {"name": "progressive"}
    method |= {renamed.get(key, key): value for key, value in chain.items()}
    if "anneal" in update:
        method["lr_schedule"] = "linear" if update.pop("anneal") else "constant"
    method |= update
    for key in ("prediction_type", "clip_samples", "weights_space"):
        if (value := tree.pop(key, None)) not in (None, False):
            method[key] = value
    if isinstance(tree.get("schedule"), str):
        method["schedule"] = tree.pop("schedule")
    else:
        method |= _levels(_section(tree, "schedule"))
    seeds = _section(tree, "seeds")
    plan: dict[str, Any] = {"arms": ["plain", "uniform"]}
    if (study := tree.pop("study", None)) is not None:
        plan["arms"] = [*plan["arms"], {"winner_of": study}]
    if "training" in seeds:
        plan["seeds"] = seeds.pop("training")
    return {**tree, "method": method, "plan": plan, "seeds": seeds}
