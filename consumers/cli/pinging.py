"""The option `--ping`: a command reports its result to a monitoring service."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

import typer
from pydantic import SecretStr

from consumers.cli.error_messages import error_message
from consumers.errors import PingNotDelivered
from consumers.ops.masking import Mask
from consumers.settings import LogSettings, PingSettings, ping_url
from consumers.terminal import escaped
from producers.errors import SettingsError
from producers.settings import read_environment

Values = TypeVar("Values")

_SETTING = "HISTORY_PING_URL"
_URL_OF_SETTING = SecretStr(_SETTING)  # value of the option that is no URL, but stands for the one of the setting


def _ping_option(text: str) -> SecretStr:
    if text == _SETTING:
        return _URL_OF_SETTING
    try:
        return ping_url(text)
    except ValueError as error:
        raise typer.BadParameter(f"{error}, or the word {_SETTING}") from None


def _url_of(option: SecretStr) -> SecretStr:
    if option != _URL_OF_SETTING:
        return option
    url = PingSettings.from_environment().url
    if url is None:
        raise SettingsError(f"{_SETTING} is not set, so --ping {_SETTING} has no URL")
    return url


Ping = Annotated[
    SecretStr | None,
    typer.Option(
        parser=_ping_option,
        metavar="URL",
        help=f"Report to a monitoring service: GET URL if all is well, otherwise POST URL/fail with the reason."
        f" The word {_SETTING} takes the URL from that setting.",
    ),
]


def read_and_ping(read: Callable[[], tuple[Values, Sequence[str]]], ping: SecretStr | None) -> tuple[Values, bool]:
    """Call `read`, which returns values and problems, and report the problems, or an error, if `ping` is given.

    Returns:
        The values, and whether there are no problems and the ping, if any, was delivered.
    """
    url = None if ping is None else _url_of(ping)
    try:
        LogSettings.from_environment()
        values, problems = read()
    except Exception as error:
        # The message of a defect may contain the content of an event.
        reason = error_message(error) or f"{type(error).__name__}, a defect: run the command by hand to see more"
        _delivered(url, [reason])
        raise
    delivered = _delivered(url, problems)
    return values, delivered and not problems


def _delivered(url: SecretStr | None, problems: Sequence[str]) -> bool:
    """Send the ping if there is a `url`. Return False, with one line on stderr, if it was not delivered."""
    if url is None:
        return True
    from consumers.ops.ping import ping as send

    mask = _mask(url)
    try:
        send(url, [mask.masked(one) for one in problems])
    except PingNotDelivered as error:
        print(f"error: {escaped(str(error))}", file=sys.stderr)
        return False
    return True


def _mask(url: SecretStr) -> Mask:
    try:
        environment: dict[str, Any] = read_environment()
    except SettingsError:  # without .env; it is the problem that is reported
        environment = {}
    return Mask.of(environment | {_SETTING: url.get_secret_value()})
