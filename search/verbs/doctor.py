"""``doctor``: look for what is wrong, and mend what is safe."""

import argparse
import json

from bdense.command import Verbs
from bdense.errors import BdenseError
from search.storage.engine import redact, resolve_storage_url
from search.verbs.common import storage_verb, study_name


def add_doctor(verbs: Verbs) -> None:
    """``doctor`` and its options."""
    parser = storage_verb(
        verbs,
        "doctor",
        "look for what is wrong with this machine, the storage and its studies",
        "bdense-search doctor digits-nfe2 --fix",
        _doctor,
    )
    parser.add_argument(
        "study",
        metavar="STUDY",
        nargs="?",
        help="look at this study's rows and files alone: its name or YAML file (default: all)",
    )
    parser.add_argument(
        "--fix",
        action="store_true",
        help="mend what is safe: free what dead workers hold, delete what finished rows left "
        "behind; never a trial, a result or a student",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one object: storage, ok, findings"
    )


def _doctor(options: argparse.Namespace) -> None:
    from search.doctor import examine

    url = resolve_storage_url(options.storage)
    name = None if options.study is None else study_name(options.study)
    findings = []
    for finding in examine(url, name, fix=options.fix):
        findings.append(finding)
        if not options.json:
            print(finding.line(), flush=True)
    problems = sum(finding.level == "problem" for finding in findings)
    if options.json:
        shown = [finding.as_dict() for finding in findings]
        answer = {"storage": redact(url), "ok": not problems, "findings": shown}
        print(json.dumps(answer))
    if problems:
        raise BdenseError(f"{problems} problem{'s' if problems > 1 else ''} left; see above")
