"""``bdense-search storage``: make and renew a database's tables, and its roles."""

import argparse
import itertools
from pathlib import Path
from typing import TYPE_CHECKING

from bdense.command import Verbs
from bdense.errors import InputError
from search.storage.engine import redact, resolve_storage_url
from search.verbs.common import storage_verb

if TYPE_CHECKING:
    from search.storage.schema import Access, Role

_ROLES: tuple[tuple[str, "Access", str], ...] = (
    ("writer", "read-write", "role that may launch and work, made if need be (PostgreSQL)"),
    ("reader", "read-only", "role that may only look, for the dashboard (PostgreSQL)"),
)


def add_storage(verbs: Verbs) -> None:
    """``storage`` and its options."""
    parser = storage_verb(
        verbs,
        "storage",
        "make a study database's tables and roles, or bring it and its studies to this version",
        "bdense-search storage init --writer bdense_rw --writer-password-file secrets/writer",
        _storage,
    )
    parser.add_argument(
        "action",
        choices=("init", "upgrade"),
        help="init: make what is missing, as the database's owner; upgrade: bring tables, studies "
        "and their row folders to this version",
    )
    for kind, _, what in _ROLES:
        parser.add_argument(f"--{kind}", metavar="NAME", help=f"init: {what}")
        parser.add_argument(
            f"--{kind}-password-file",
            metavar="FILE",
            type=Path,
            help=f"init: file with the {kind}'s password (default: it stays as it is)",
        )


def _storage(options: argparse.Namespace) -> None:
    from search.storage.schema import grant, open_tables, upgrade

    url = resolve_storage_url(options.storage)
    roles = _roles(options)
    if options.action == "upgrade":
        if roles:
            raise InputError("storage upgrade takes no --writer or --reader; give them to init")
        from search.study.upgrade import upgrade_studies

        for line in itertools.chain(upgrade(url), upgrade_studies(url)):
            print(line, flush=True)
        return
    open_tables(url)
    print(f"tables are there: {redact(url)}")
    left = grant(url, roles) if roles else []
    for role in roles:
        print(f"{role.name} may {role.access}")
    for statement in left:
        print(f"for the database's administrator, optional: {statement}")


def _roles(options: argparse.Namespace) -> "list[Role]":
    from search.storage.schema import Role, read_password

    roles = []
    for kind, access, _ in _ROLES:
        name, file = getattr(options, kind), getattr(options, f"{kind}_password_file")
        if name is not None:
            password = None if file is None else read_password(file)
            roles.append(Role(name=name, access=access, password=password))
        elif file is not None:
            raise InputError(f"--{kind}-password-file {file} needs --{kind} NAME beside it")
    return roles
