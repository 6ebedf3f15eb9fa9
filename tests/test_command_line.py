"""The command line: its help, versions and exit codes, and that its page names every command; the demo."""

from __future__ import annotations

import argparse

import pytest

from ringpass import __main__ as command_line
from ringpass import __version__, demo
from ringpass.__main__ import COMMANDS, main
from ringpass.errors import OptionError
from tests.support.repository import ROOT

PAGE = (ROOT / "docs" / "command_line.md").read_text()


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, "--version").startswith(f"ringpass {__version__}, torch 2.")


def test_help_has_an_example_for_each_command(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "--help")
    assert "exit codes: 0 fine, 1 found a problem, 2 bad input" in text
    for name, command in COMMANDS.items():
        assert command.example.startswith(f"ringpass {name}") and command.example in text
        assert command.example in shown(capsys, name, "--help")


@pytest.mark.parametrize(("started", "name"), [("/bin/ringpass", "ringpass"), ("x/__main__.py", "python -m ringpass")])
def test_the_program_has_the_name_it_was_started_by(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, started: str, name: str
) -> None:
    monkeypatch.setattr("sys.argv", [started])
    assert shown(capsys, "--help").startswith(f"usage: {name} [-h]")


def test_exit_codes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(args: argparse.Namespace) -> int:
        raise OptionError("expected a, got b")

    for run, code in ((lambda args: 0, 0), (lambda args: 1, 1), (fails, 2)):
        command = command_line.Command("", "", lambda parser: None, run)
        monkeypatch.setattr(command_line, "COMMANDS", {"try": command})
        assert main(["try"]) == code
    assert capsys.readouterr().err == "ringpass try: expected a, got b\n"
    with pytest.raises(SystemExit) as stop:
        main(["unknown"])
    assert stop.value.code == 2


def test_the_page_names_every_command() -> None:
    for name, command in COMMANDS.items():
        assert f"| `{name}` |" in PAGE and f"`{command.example}`" in PAGE, name


# --- demo -------------------------------------------------------------------------------------------------------------


def test_demo_refuses_one_rank(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--ranks", "1"]) == 2
    assert "--ranks must be from 2 to 16, got 1" in capsys.readouterr().err


@pytest.mark.parametrize(("difference", "code"), [(1e-7, 0), (1e-3, 1), (float("nan"), 1)])
def test_demo_judges_the_difference(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, difference: float, code: int
) -> None:
    found = ("the plan", (4.0, 4.0), 0.0, difference)
    monkeypatch.setattr(demo, "run_on_local_ranks", lambda *args, **kwargs: [found, found])
    assert main(["demo"]) == code
    printed = capsys.readouterr().out
    assert ("2 ranks match 1 rank" in printed) == (code == 0) and ("DIFFER" in printed) == (code == 1)
    assert "the plan" in printed and "next: " in printed


@pytest.mark.slow
def test_demo_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo"]) == 0
    printed = capsys.readouterr().out
    assert "axis 0: 512 tokens, zigzag" in printed and "2 ranks match 1 rank" in printed
