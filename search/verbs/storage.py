"""``storage`` makes a database's tables and roles, ``doctor`` looks for what is wrong with it."""

import itertools
import json
from pathlib import Path

from bdense.errors import BdenseError, InputError
from search.doctor import examine
from search.redaction import redact
from search.storage.engine import resolve_storage_url
from search.storage.schema import Access, Role, grant, open_tables, upgrade
from search.study.upgrade import upgrade_studies
from search.verbs.common import study_name
from search.verbs.options import DoctorOptions, TablesOptions

_ROLES: tuple[tuple[str, Access], ...] = (("writer", "read-write"), ("reader", "read-only"))


def storage(asked: TablesOptions) -> None:
    """Create or upgrade the tables, and say what was done."""
    url, roles = resolve_storage_url(asked.storage), _roles(asked)
    if asked.action == "upgrade":
        if roles:
            raise InputError("storage upgrade takes no --writer or --reader; give them to init")
        for line in itertools.chain(upgrade(url), upgrade_studies(url)):
            print(line, flush=True)
        return
    left = grant(url, roles) if roles else []  # refuses a file before it makes one
    open_tables(url)
    print(f"tables are there: {redact(url)}")
    for role in roles:
        print(f"{role.name} may {role.access}")
    for statement in left:
        print(f"for the database's administrator, optional: {statement}")


def _roles(asked: TablesOptions) -> list[Role]:
    roles = []
    for kind, access in _ROLES:
        name, file = getattr(asked, kind), getattr(asked, f"{kind}_password_file")
        if name is not None:
            password = None if file is None else read_password(file)
            roles.append(Role(name=name, access=access, password=password))
        elif file is not None:
            raise InputError(f"--{kind}-password-file {file} needs --{kind} NAME beside it")
    return roles


def read_password(path: Path) -> str:
    """A password from its file, without the line's end.

    Raises:
        InputError: It cannot be read, or is empty.
    """
    try:
        password = path.read_text().rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the password file {path} cannot be read: {error}") from error
    if not password:
        raise InputError(f"the password file {path} is empty; write the password into it")
    return password


def doctor(asked: DoctorOptions) -> None:
    """Print the findings; fail if problems are left."""
    url = resolve_storage_url(asked.storage)
    name = None if asked.study is None else study_name(asked.study)
    findings = []
    for finding in examine(url, name):
        findings.append(finding.repaired() if asked.fix else finding)
        if not asked.json:
            print(findings[-1].line(), flush=True)
    problems = sum(finding.level == "problem" for finding in findings)
    if asked.json:
        shown = [finding.as_dict() for finding in findings]
        answer = {"storage": redact(url), "ok": not problems, "findings": shown}
        print(json.dumps(answer))
    if problems:
        raise BdenseError(f"{problems} problem{'s' if problems > 1 else ''} left; see above")
