"""Study files as they were written before there was one form for all methods.

Two forms: searches of SFD's weights (``student``, ``budget``) and promotions to progressive
distillation (``chain``, ``round``). Both are read as what they say today.
"""

from typing import Any

from bdense.diffusion.solver_names import SOLVERS

_USUAL_LEVELS = {"rho": 7.0, "sigma_min": 0.006, "sigma_max": 80.0}
_SAMPLERS = {"tpe": "TPESampler", "gp": "GPSampler", "random": "RandomSampler"}


def translated(tree: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """A tree in today's form, and one line that says how to write it now; "" if it was.

    Args:
        tree: A study file's mapping, or a stored spec of an older version.
    """
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


def _search(tree: dict[str, Any]) -> dict[str, Any]:
    student, budget = dict(tree.pop("student", {})), dict(tree.pop("budget", {}))
    plan: dict[str, Any] = {}
    if "trials" in budget:
        plan["trials"] = budget.pop("trials")
    student.pop("method", None)
    solver = student.pop("solver", {})
    solver = {"name": solver} if isinstance(solver, str) else dict(solver)
    levels = _levels(student.pop("schedule", None))
    method = {"name": "sfd", **student, **levels}
    if "name" in solver:
        method["solver"] = solver["name"]
    name = solver.get("name", "dpmpp")
    # Stored specs spell out the highest order, which is what comes unasked.
    if name in SOLVERS and solver.get("order") not in (None, SOLVERS[name][-1]):
        method["order"] = solver["order"]
    if solver.get("thresholding"):
        method["thresholding"] = True
    plan |= _sampler(tree.pop("sampler", None)) | _pruning(dict(tree.pop("pruning", {})))
    tree.pop("stop", None)
    if isinstance(tree.get("confirm"), dict):
        tree["confirm"] = confirm = dict(tree["confirm"])
        if (kimg := confirm.pop("kimg", None)) is not None:
            confirm["method"] = {"kimg": kimg}
    weights = tree.get("weights")
    if isinstance(weights, dict) and "parameterisation" in weights:
        kept = {key: value for key, value in weights.items() if key != "parameterisation"}
        tree["weights"] = {"name": weights["parameterisation"], **kept}
    return {**tree, "method": method | budget, "plan": plan}


def _levels(schedule: dict[str, Any] | None) -> dict[str, Any]:
    """A schedule's kind and its numbers, which are settings of the method."""
    if not schedule:
        return {}
    kept = {key: value for key, value in schedule.items() if key != "kind"}
    return {"schedule": schedule.get("kind", "polynomial"), **kept}


def _sampler(given: dict[str, Any] | None) -> dict[str, Any]:
    if given is None:
        return {}
    name = str(given.get("name", "tpe"))
    options = {key: value for key, value in given.items() if key not in ("name", "startup_trials")}
    if "startup_trials" in given and name != "random":
        options["n_startup_trials"] = given["startup_trials"]
    return {"sampler": {"name": _SAMPLERS.get(name, name), **options}}


def _pruning(given: dict[str, Any]) -> dict[str, Any]:
    plan = {key: given[key] for key in ("at", "images") if given.get(key)}
    startup = {"n_startup_trials": given.get("startup_trials") or 5}
    factor = given.get("factor") or 2
    known: dict[str, dict[str, Any]] = {
        "median": {"name": "MedianPruner", **startup},
        "percentile": {
            "name": "PercentilePruner",
            "percentile": given.get("percentile") or 25.0,
            **startup,
        },
        "successive-halving": {"name": "SuccessiveHalvingPruner", "reduction_factor": factor},
        "hyperband": {"name": "HyperbandPruner", "reduction_factor": factor},
        "patient-median": {
            "name": "PatientPruner",
            "wrapped_pruner": {"name": "MedianPruner", **startup},
            "patience": given.get("patience") or 1,
        },
    }
    if isinstance(given.get("pruner"), dict):
        plan["pruner"] = given["pruner"]
    elif (pruner := given.get("pruner", "none")) != "none":
        plan["pruner"] = known.get(pruner, {"name": pruner})
    return plan


def _promotion(tree: dict[str, Any]) -> dict[str, Any]:
    chain, update = dict(tree.pop("chain", {})), dict(tree.pop("round", {}))
    renamed = {"first": "steps", "last": "until", "substeps": "substeps"}
    method: dict[str, Any] = {"name": "progressive"}
    method |= {new: chain[old] for old, new in renamed.items() if old in chain}
    if "anneal" in update:
        method["lr_schedule"] = "linear" if update.pop("anneal") else "constant"
    method |= update
    for key in ("prediction_type", "clip_samples", "weights_space"):
        if (value := tree.pop(key, None)) not in (None, False):
            method[key] = value
    if (schedule := tree.pop("schedule", "native")) != "native":
        # Unset they are these, which stored specs spell out.
        levels = _levels(schedule).items()
        method |= {key: value for key, value in levels if value != _USUAL_LEVELS.get(key)}
    seeds = dict(tree.pop("seeds", {}))
    plan: dict[str, Any] = {"arms": ["plain", "uniform"]}
    if (study := tree.pop("study", None)) is not None:
        plan["arms"] = [*plan["arms"], {"winner_of": study}]
    if "training" in seeds:
        plan["seeds"] = seeds.pop("training")
    return {**tree, "method": method, "plan": plan, "seeds": seeds}
