"""The commands in the documents and in the help, compared with the code: names, options, examples."""

from __future__ import annotations

import json
import logging
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from consumers.cli import app
from tests.documents import ROOT, block, blocks, documents, table, text_of

COMMANDS_DOCUMENT = "consumers/cli/README.md"
ALERTS = ROOT / "consumers/deploy/alerts.yaml"
_LINE_OF_SHELL = re.compile(r"(?:^|\s|/)trading-history ((?!=|-)[a-z][^;|&`}\n]*)")
_LINE_OF_PROGRAM = re.compile(r"trading-history ([^;|&`\"}\n]+)")


def _commands() -> dict[str, Any]:
    """Return each command by its full name, such as `audit` or `outbox status`."""
    found: dict[str, Any] = {}
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]  # a click group
        parts = getattr(command, "commands", None)
        found |= {name: command} if parts is None else {f"{name} {part}": one for part, one in parts.items()}
    return found


def _options(command: Any, *, hidden: bool = True) -> set[str]:
    """Return the long names of a command's options, without --help."""
    options = [one for one in command.params if hidden or not getattr(one, "hidden", False)]
    return {name for one in options for name in one.opts if name.startswith("--")} - {"--help"}


def _unknown(line: str) -> list[str]:
    """Return the command line if its command does not exist, otherwise its options that do not exist."""
    words, commands = line.split(), _commands()
    name = next((name for name in commands if words[: len(name.split())] == name.split()), None)
    named = set(re.findall(r"(?<!\S)--[\w-]+", line)) - {"--help"}
    return [line] if name is None else [f"{name} {option}" for option in named - _options(commands[name])]


def test_table_of_commands_has_each_command_with_all_its_options() -> None:
    """A command that was added or removed, or an option that has another name, fails this test."""
    commands = _commands()
    documented: dict[str, set[str]] = {}
    for cell, options, _ in table(COMMANDS_DOCUMENT, "commands"):
        for line in re.findall("`([^`]+)`", cell):
            name = " ".join(word for word in line.split() if word.islower())
            documented[name] = {option.split()[0] for option in re.findall("`([^`]+)`", options)}
    assert documented == {name: _options(command, hidden=False) for name, command in commands.items()}


def test_help_of_each_command_is_a_sentence_and_an_example_that_can_be_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder that has the folder of old files that examples name."""
    (tmp_path / "data/history").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    commands = get_command(app).commands  # type: ignore[attr-defined]  # a click group
    groups = {name: str(command.help) for name, command in commands.items() if hasattr(command, "commands")}
    helps = {name: str(command.help) for name, command in _commands().items()}
    assert set(groups) == {"failed", "outbox"}
    for name, text in {**helps, **groups}.items():
        sentence, example = text.split("\n\n")
        assert re.fullmatch(r"[A-Z][^.]*(\.json[^.]*)?\.", " ".join(sentence.split())), name
        (line,) = re.findall(r"^Example: trading-history (.*)$", example, re.M)
        assert line.startswith(name)
        _parse(line)


def test_each_option_and_argument_has_a_help() -> None:
    without = [
        f"{name} {one.name}"
        for name, command in _commands().items()
        for one in command.params
        if one.name != "help" and not getattr(one, "hidden", False) and not one.help
    ]
    assert without == []


def _parse(line: str) -> None:
    """Parse a whole command line without running it.

    Raises:
        UsageError: an option or argument is missing, unknown, or has a value of the wrong type.
    """
    words = shlex.split(line, comments=True)
    words = words[: words.index(">")] if ">" in words else words
    name = max((name for name in _commands() if words[: len(name.split())] == name.split()), key=len)
    _commands()[name].make_context(name, words[len(name.split()) :])


def _shell_lines(document: str) -> list[str]:
    """Return the command lines in the code blocks of a document, without the program's name."""
    lines = [line for one in blocks(document) for line in one.text.replace("\\\n", " ").splitlines()]
    found = [_LINE_OF_SHELL.search(line) for line in lines if not line.lstrip().startswith("#")]
    return [one[1].strip() for one in found if one]


@pytest.mark.parametrize("document", documents())
def test_command_lines_in_code_blocks_can_be_run(document: str) -> None:
    """They have all required options and arguments, no others, and values of the right type."""
    for line in _shell_lines(document):
        _parse(line)


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("withdraw 7c1f366e-c9c3-5876-873e-6a33c29b098d", "Missing parameter: reason"),
        ("failed requeue ONE TWO", "unexpected extra argument"),
        ("audit --since tomorrow", "tomorrow is not a time"),
        ("worker --processes two", "valid integer"),
    ],
)
def test_a_command_line_that_cannot_be_run_is_found(line: str, error: str) -> None:
    with pytest.raises(Exception, match=error):
        _parse(line)


def test_most_command_lines_of_code_blocks_are_found() -> None:
    assert len([line for document in documents() for line in _shell_lines(document)]) > 25


def _command_lines(document: str) -> Iterator[str]:
    """Yield the command lines of a document without the program's name: from its code blocks and its `spans`."""
    text = re.sub(r"^[ \t]*```.*?^[ \t]*```$", "", text_of(document), flags=re.M | re.S)
    spans = [" ".join(span.split()) for span in re.findall("`([^`]+)`", text)]
    for part in [*(one.text.replace("\\\n", "") for one in blocks(document)), *spans]:
        yield from _LINE_OF_PROGRAM.findall(part)
    groups = {name.split()[0] for name in _commands()}
    yield from (span for span in spans if span.split()[0] in groups and len(span.split()) > 1)


@pytest.mark.parametrize("document", documents())
def test_commands_and_options_in_a_document_exist(document: str) -> None:
    """A line begins with a command, or with an option of the program itself, such as --debug."""
    lines = list(_command_lines(document))
    assert [one for line in lines if line[0] not in "-…" for one in _unknown(line.rstrip(" .…"))] == []
    assert {line.split()[0] for line in lines if line[0] == "-"} <= _options(get_command(app)) | {"--help"}


def test_most_documents_name_commands() -> None:
    """The search for command lines must find some."""
    assert len([line for document in documents() for line in _command_lines(document)]) > 50


def test_commands_in_the_alert_rules_exist() -> None:
    lines = re.findall(r"`trading-history ([^`]+)`", " ".join(ALERTS.read_text("utf-8").split()))
    assert len(lines) > 10
    assert [one for line in lines for one in _unknown(line.rstrip(" .…"))] == []


def test_documented_handling_of_rejected_events_uses_existing_commands() -> None:
    lines = block("consumers/ops/REJECTIONS.md", "handle rejected events").splitlines()
    assert [one for line in lines for one in _unknown(line.removeprefix("trading-history "))] == []
    assert {shlex.split(line)[2] for line in lines} == {"list", "show", "requeue", "discard"}


def test_documented_options_that_select_rejected_events_are_those_of_the_commands() -> None:
    documented = {
        option.split()[0]
        for cell, _ in table("consumers/ops/REJECTIONS.md", "selecting rejected events")
        for option in re.findall("`([^`]+)`", cell)
    }
    commands = _commands()
    shared = set.intersection(*(_options(commands[f"failed {name}"]) for name in ("list", "requeue", "discard")))
    assert documented == shared


def test_documented_set_up_of_json_logs_writes_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    exec(block("consumers/ops/README.md", "json log lines of a controller"), {})
    logging.getLogger("bot").warning("stored %d", 1, extra={"sequence": 7})
    line = json.loads(capsys.readouterr().err)
    assert set(line) == {"time", "level", "logger", "process", "message", "sequence"}
    assert line["message"] == "stored 1"


def test_documented_lines_of_cron_ping_with_the_url_of_the_setting() -> None:
    lines = [
        block("consumers/ops/PING.md", "crontab"),
        block("consumers/ops/PING.md", "crontab of a controller"),
    ]
    for line in lines:
        command = line.strip().partition("&& trading-history ")[2]
        _parse(command)
        assert (line[:12], command.rpartition(" --ping ")[2]) == ("*/5 * * * * ", "HISTORY_PING_URL > /dev/null")
