"""Events of any kind: the rules that a new kind gets from its base classes, and the table of kinds."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, ClassVar, Literal

import pytest
from pydantic import AfterValidator

from producers.errors import InvalidEvent
from producers.event_kinds import Column, Event, EventKind, EventKinds, Payload
from producers.events import KINDS, decode, encode, event_of
from producers.fields import Instant, contract_error
from tests.factories import INSTANT, a_snapshot


def _refused_if_empty(text: str) -> str:
    if not text:
        raise contract_error("\x1b" + "x" * 2000)
    return text


class Fill(Payload):
    """A part of an order that was executed."""

    type: ClassVar[str] = "trading.fill.v1"
    identity: ClassVar[tuple[str, ...]] = ("venue", "order", "fill")

    venue: str
    order: int
    fill: int
    filled_at: Instant
    is_last: bool = False
    note: Annotated[str, AfterValidator(_refused_if_empty)] = "none"

    @property
    def instant(self) -> datetime:
        return self.filled_at

    @property
    def subject(self) -> str:
        return f"fills/{self.order}"

    @property
    def summary(self) -> str:
        return f"fill {self.fill}"


class FillEvent(Event):
    type: Literal["trading.fill.v1"]
    data: Fill


class Login(Fill):
    type: ClassVar[str] = "trading.login.v1"
    identity: ClassVar[tuple[str, ...]] = ("venue",)


class LoginEvent(Event):
    type: Literal["trading.login.v1"]
    data: Login


FILL = EventKind(
    name="fill",
    model=FillEvent,
    job_function="bot.store_fill",
    table="fills",
    columns=(Column("venue", "text"), Column("order_number", "bigint", attribute="order")),
)
LOGIN = EventKind(name="login", model=LoginEvent, job_function="bot.store_login", table="logins", columns=())


def a_fill(**overrides: Any) -> Fill:
    return Fill.checked(**{"venue": "x", "order": 7, "fill": 1, "filled_at": INSTANT} | overrides)


@pytest.mark.parametrize(
    ("field", "value"), [("venue", b"x"), ("order", "7"), ("order", 7.0), ("is_last", "yes"), ("is_last", 1)]
)
def test_a_field_of_a_plain_type_takes_only_values_of_this_type(field: str, value: object) -> None:
    """Nothing is converted: the event has the value that the caller passed."""
    with pytest.raises(InvalidEvent, match=f"^{field}: "):
        a_fill(**{field: value})


@pytest.mark.parametrize(
    ("kind", "names"), [(FILL, "type, venue, order and fill"), (LOGIN, "type and venue")], ids=["fill", "login"]
)
def test_the_message_about_a_wrong_id_names_the_fields_that_identify_the_event(kind: EventKind, names: str) -> None:
    with KINDS.register(kind):
        payload = kind.payload.checked(**dict(a_fill()))
        text = encode(event_of(payload, source="bot/1", sequence=1))
        assert decode(text, kind.model).data == payload
        with pytest.raises(InvalidEvent, match=f"^id: does not match {names}$") as caught:
            decode(text.replace('"venue":"x"', '"venue":"y"'), kind.model)
    assert caught.value.field == "id"


def test_a_message_has_at_most_1000_printable_characters() -> None:
    """Also if the reason of a new kind of event is longer. Logs and tables show it."""
    with pytest.raises(InvalidEvent) as caught:
        a_fill(note="")
    message = str(caught.value)
    assert (len(message), message.isprintable(), message[:12], message[-2:]) == (1000, True, "note: \\x1bxx", "x…")


def test_a_column_has_the_value_of_the_field_with_its_name_unless_it_names_another_one() -> None:
    assert [column.field for column in FILL.columns] == ["venue", "order"]


def test_a_kind_is_found_by_its_type_its_job_function_and_its_payload() -> None:
    kinds = EventKinds(FILL)
    assert (len(kinds), list(kinds), kinds[Fill.type]) == (1, [Fill.type], FILL)
    assert (kinds.of_job("bot.store_fill"), kinds.of_job("bot.store_login")) == (FILL, None)
    assert kinds.has(a_fill())
    assert not kinds.has(a_snapshot())
    assert not kinds.has(FILL)  # it has the same type, but is no payload


def test_a_payload_of_another_class_does_not_belong_to_a_kind_with_the_same_type() -> None:
    """It may have other fields."""

    class Order(Fill):
        pass

    class Other(Payload):
        type: ClassVar[str] = Fill.type
        identity: ClassVar[tuple[str, ...]] = ()
        instant = subject = summary = property(str)  # is not used

    kinds = EventKinds(FILL)
    assert kinds.has(Order.checked(**dict(a_fill())))
    assert not kinds.has(Other.checked())


def test_a_kind_may_be_added_for_one_block() -> None:
    """As a test does. Without the block, it stays."""
    kinds = EventKinds(FILL)
    with kinds.register(LOGIN):
        assert (list(kinds), kinds.of_job("bot.store_login")) == ([Fill.type, Login.type], LOGIN)
    assert (list(kinds), kinds.of_job("bot.store_login"), kinds.of_job("bot.store_fill")) == ([Fill.type], None, FILL)
    kinds.register(LOGIN)
    assert list(kinds) == [Fill.type, Login.type]


@pytest.mark.parametrize("name", ["type", "name", "job_function", "table"])
def test_two_kinds_cannot_have_the_same_type_name_function_or_table(name: str) -> None:
    """Registering the second one raises an error and changes nothing."""
    values: dict[str, Any] = {"name": "login", "job_function": "bot.store_login", "table": "logins", "columns": ()}
    values["model"] = FillEvent if name == "type" else LoginEvent
    if name != "type":
        values[name] = getattr(FILL, name)
    kinds = EventKinds(FILL)
    with pytest.raises(ValueError, match=f"^another kind of event has the {name} {getattr(FILL, name)}$"):
        kinds.register(EventKind(**values))
    assert (list(kinds), kinds.of_job("bot.store_fill"), kinds.of_job("bot.store_login")) == ([Fill.type], FILL, None)
