"""The help texts are part of the interface: docs/cli.txt holds them, and changes with them."""

import argparse
from pathlib import Path

import pytest

import bdense.cli
import search.cli

CLI = Path(__file__).parents[1] / "docs/cli.txt"


def all_help() -> str:
    """Help of both commands and all their verbs, 100 columns wide."""
    texts = []
    for parser in (search.cli._parser(), bdense.cli._parser()):
        texts.append(parser.format_help())
        verbs = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        texts += [verb.format_help() for verb in verbs.choices.values()]
    return "\n".join(texts)


def test_docs_hold_the_help_texts(monkeypatch):
    """To renew the file: BDENSE_WRITE_DOCS=1 pytest tests/test_help.py."""
    import os

    monkeypatch.setenv("COLUMNS", "100")
    if os.environ.get("BDENSE_WRITE_DOCS"):
        CLI.write_text(all_help())
    # Python versions break lines differently.
    assert all_help().split() == CLI.read_text().split()


def test_every_option_and_verb_explains_itself_with_an_example():
    for parser in (search.cli._parser(), bdense.cli._parser()):
        verbs = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        for name, verb in verbs.choices.items():
            assert verb.epilog.startswith(f"example: {parser.prog} {name} ")
            assert not [a.dest for a in verb._actions if not a.help]
            # What it is comes first, not whose.
            assert not [a.help for a in verb._actions if a.help.startswith(("of ", "or "))]


@pytest.mark.parametrize("main", [search.cli.main, bdense.cli.main])
def test_no_verb_is_a_mistake(main, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert "VERB" in capsys.readouterr().err
