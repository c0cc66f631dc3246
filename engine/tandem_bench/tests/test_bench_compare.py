"""Endpoints side by side: the same arrivals and lengths, other tokens, one after the other."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import pytest
from deadlines import patience

from tandem_bench.errors import EndpointError, WorkloadError
from tandem_bench.serve.campaign import plan
from tandem_bench.serve.compare import SCHEMA, Options, name_endpoints, run
from tandem_bench.tests.scripted_endpoint import ScriptedEndpoint, status

TWO = ("first=http://127.0.0.1:1", "http://127.0.0.1:2")


@contextlib.contextmanager
def served(endpoint: ScriptedEndpoint) -> Iterator[str]:
    """The endpoint's URL, while another thread answers: `run` wants a loop of its own."""
    ready, done = threading.Event(), asyncio.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        async with endpoint.serving():
            ready.set()
            await done.wait()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert ready.wait(patience(10))
    try:
        yield endpoint.url
    finally:
        loops[0].call_soon_threadsafe(done.set)
        thread.join(patience(10))


def fast(*endpoints: str, **changes: Any) -> Options:
    values: dict[str, Any] = {
        "rates": "100,200",
        "duration": 0.2,
        "input_len": "5-9",
        "output_len": "4",
        "warmup": 0,
        "vocab_size": 1000,
    }
    return Options(endpoints=endpoints, **{**values, **changes})


def test_endpoints_have_names() -> None:
    assert name_endpoints(TWO) == [
        ("first", "http://127.0.0.1:1"),
        ("http://127.0.0.1:2", "http://127.0.0.1:2"),
    ]
    assert name_endpoints(("http://a/?x=1", "b"))[0] == ("http://a/?x=1", "http://a/?x=1")


@pytest.mark.parametrize(
    ("endpoints", "rates", "says"),
    [
        (("http://a",), "8", "only one endpoint"),
        (("a=http://a", "a=http://b"), "8", "are called 'a'"),
        (TWO, "8,fast", "not a list of rates"),
    ],
)
def test_what_can_not_be_compared_is_refused(
    endpoints: tuple[str, ...], rates: str, says: str
) -> None:
    with pytest.raises(WorkloadError, match=says):
        Options(endpoints=endpoints, rates=rates).campaigns()


def test_arrivals_and_lengths_are_the_same_and_tokens_are_not() -> None:
    campaigns = fast(*TWO, nonce=7).campaigns()
    assert [(each.title, each.rates) for each in campaigns] == [
        ("first", (100.0,)),
        ("http://127.0.0.1:2", (100.0,)),
        ("first", (200.0,)),
        ("http://127.0.0.1:2", (200.0,)),
    ]
    one, other = (list(islice(plan(each, None, 100.0), 50)) for each in campaigns[:2])
    assert one == other
    assert len({each.nonce for each in campaigns}) == 4


def test_both_are_asked_and_shown_side_by_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick, other, file = ScriptedEndpoint(), ScriptedEndpoint(), tmp_path / "found.json"
    with served(quick) as one, served(other) as two:
        run(fast(f"quick={one}", f"other={two}", json_file=file))
    shown = capsys.readouterr().out
    for text in ("100 req/s", "200 req/s", "quick", "other", "goodput", "longest gap, ms"):
        assert text in shown
    sent = [sorted(len(body["prompt"]) for body in each.bodies) for each in (quick, other)]
    assert sent[0] == sent[1] != []
    document = msgspec.json.decode(file.read_bytes())
    assert document["schema"] == SCHEMA
    assert [report["title"] for report in document["reports"]] == ["quick", "other"] * 2


def test_an_endpoint_that_answers_nothing_is_an_error() -> None:
    broken = ScriptedEndpoint(script=lambda _: status(500))
    with (
        served(ScriptedEndpoint()) as one,
        served(broken) as two,
        pytest.raises(EndpointError, match="broken answered no request"),
    ):
        run(fast(f"good={one}", f"broken={two}", rates="100"))
