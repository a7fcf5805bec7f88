"""The help texts are part of the interface: docs/cli.txt holds them, and changes with them."""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import bdense.cli
import search.cli
from bdense.methods import METHODS

CLI = Path(__file__).parents[1] / "docs/cli.txt"


def verbs_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of a command's verbs."""
    verbs = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return dict(verbs.choices)


def all_parsers() -> Iterator[argparse.ArgumentParser]:
    """Both commands', each followed by its verbs', ``bdense distill``'s once for each method."""
    for cli in (search.cli, bdense.cli):
        yield cli.make_parser([])
        for verb in cli.VERBS:
            for method in METHODS if verb == "distill" else ("",):
                arguments = [verb, *(("--method", method) if method else ())]
                yield verbs_of(cli.make_parser(arguments))[verb]


def all_help() -> str:
    """Help of both commands and all their verbs, 100 columns wide."""
    return "\n".join(parser.format_help() for parser in all_parsers())


def test_docs_hold_the_help_texts(monkeypatch):
    """To renew the file: BDENSE_WRITE_DOCS=1 pytest tests/test_help.py."""
    monkeypatch.setenv("COLUMNS", "100")
    if os.environ.get("BDENSE_WRITE_DOCS"):
        CLI.write_text(all_help())
    # Python versions break lines differently.
    assert all_help().split() == CLI.read_text().split()


def test_every_option_and_verb_explains_itself_with_an_example():
    for parser in all_parsers():
        assert parser.epilog.startswith(f"example: {parser.prog} ")
        for action in parser._actions:
            assert action.help or isinstance(action, argparse._SubParsersAction), action
            # What it is comes first, not whose.
            assert not (action.help or "").startswith(("of ", "or ")), action.help


@pytest.mark.parametrize(("cli", "meant"), [(search.cli, "launch"), (bdense.cli, "sample")])
def test_a_misspelt_verb_is_likened_to_one(cli, meant, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main([meant[:-1], "--help"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"did you mean {meant}?")


@pytest.mark.parametrize("main", [search.cli.main, bdense.cli.main])
def test_no_verb_is_a_mistake(main, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert "VERB" in capsys.readouterr().err
