"""``doctor``: look for what is wrong, and mend what is safe."""

import json

from bdense.errors import BdenseError
from search.doctor import examine
from search.redaction import redact
from search.verbs.common import storage_url, study_name
from search.verbs.options import DoctorOptions


def doctor(asked: DoctorOptions) -> None:
    """Print the findings; fail if problems are left."""
    url = storage_url(asked)
    name = None if asked.study is None else study_name(asked.study)
    findings = []
    for finding in examine(url, name, fix=asked.fix):
        findings.append(finding)
        if not asked.json:
            print(finding.line(), flush=True)
    problems = sum(finding.level == "problem" for finding in findings)
    if asked.json:
        shown = [finding.as_dict() for finding in findings]
        answer = {"storage": redact(url), "ok": not problems, "findings": shown}
        print(json.dumps(answer))
    if problems:
        raise BdenseError(f"{problems} problem{'s' if problems > 1 else ''} left; see above")
