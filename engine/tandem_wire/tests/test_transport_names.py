"""The table of transports' names."""

from typing import get_args

import msgspec
import pytest

from tandem_wire.handoff import (
    TRANSPORT_CHOICES,
    TransportChoice,
    TransportName,
    TransportOffer,
    transport_name,
)


def test_the_table_holds_every_name_in_both_spellings() -> None:
    assert list(TRANSPORT_CHOICES) == ["auto", *get_args(TransportName)]
    assert list(dict.fromkeys(TRANSPORT_CHOICES.values())) == list(get_args(TransportChoice))


def test_a_choice_is_the_name_with_a_capital() -> None:
    for choice in get_args(TransportChoice):
        name = transport_name(choice)
        assert (TRANSPORT_CHOICES[name], name[0].upper() + name[1:]) == (choice, choice)


def test_an_offer_of_an_unknown_transport_is_no_message() -> None:
    frame = msgspec.msgpack.encode({"name": "pigeon", "details": {}})
    with pytest.raises(msgspec.ValidationError, match="pigeon"):
        msgspec.msgpack.decode(frame, type=TransportOffer)
