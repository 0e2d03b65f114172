"""Completion servers behind `submit`: the same tokens as here, and one clear line for whatever can go wrong."""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from moss.chat import META_INSTRUCTION, Dialog, Turn, render
from moss.engine import Engine, EngineError, Sampling, Token
from moss.engine.grammar import commands_grammar
from moss.engine.remote import KEY, RemoteEngine
from moss.resolve import load
from moss.tokenizer import Tokenizer
from tests.fake_server import FakeServer, Reply, Request, completes, completion

KEEP = Sampling(max_tokens=8, stop_ids=frozenset({9}))


@pytest.fixture(scope="module")
def nano() -> Iterator[tuple[Engine, Tokenizer]]:
    """The bundled model, whose bits are the same whether it has read a prompt before or not."""
    model, tok = load()
    with Engine(model, deterministic=True) as engine:
        yield engine, tok


def prompt(tok: Tokenizer) -> list[int]:
    """A question that the bundled model answers with thoughts and a command."""
    switches = {"thoughts": True, "calculator": True, "solver": True}
    return render(Dialog(META_INSTRUCTION, switches, [Turn("What is 37*12?")]), tok, until="thoughts")[0]


def ids(tokens: list[Token]) -> list[int]:
    return [token.id for token in tokens]


def answered(*replies: Any, sampling: Sampling = KEEP, **values: Any) -> tuple[list[int], str | None]:
    """What one request gives: ids and finish."""
    with FakeServer(*replies) as server, RemoteEngine(server.url, **values) as engine:
        stream = engine.submit([1, 2, 3], sampling)
        return ids(list(stream)), stream.finish


def failure(reply: Any, sampling: Sampling = KEEP, **values: Any) -> str:
    """What one request that fails says."""
    with FakeServer(reply) as server, RemoteEngine(server.url, **values) as engine:
        with pytest.raises(EngineError) as caught:
            list(engine.submit([1, 2, 3], sampling))
        assert "\n" not in str(caught.value)
        return str(caught.value).replace(server.url, "URL")


# ------------------------------------------------------------------------------------------------- the same tokens


@pytest.mark.parametrize("form", ["token_ids", "token_id:", "content"])
def test_the_same_tokens_as_the_engine_behind(nano: tuple[Engine, Tokenizer], form: str):
    """Whoever moves a model to a server must get the model he had, whichever way the server spells ids."""
    local, tok = nano
    for settings in (
        {"temperature": 0.0},
        {"temperature": 1.0, "top_p": 0.9, "top_k": 30, "seed": 5, "repetition_penalty": 1.1},
    ):
        sampling = Sampling(max_tokens=40, stop_ids=frozenset(tok.marker("<eoc>")), **settings)
        here = local.submit(prompt(tok), sampling, logprobs=2)
        expected = list(here)
        with (
            FakeServer(completes(local, form)) as server,
            RemoteEngine(server.url, "m", vocab_size=tok.vocab_size) as engine,
        ):
            stream = engine.submit(prompt(tok), sampling, logprobs=2)
            got = list(stream)
        assert ids(got) == ids(expected)
        assert (stream.finish, stream.prompt_tokens, stream.reused) == (here.finish, here.prompt_tokens, 7)
        for token, other in zip(got, expected, strict=True):
            assert token.logprob == other.logprob
            assert [id for id, _ in token.top] == [id for id, _ in other.top]


def test_everything_that_steers_the_choice_is_sent(nano: tuple[Engine, Tokenizer]):
    """A server fills what is missing with its model's defaults, such as a repetition penalty nobody asked for."""
    with FakeServer(*[[completion(9, finish="stop")]] * 2) as server, RemoteEngine(server.url) as engine:
        list(engine.submit([1, 2], Sampling(max_tokens=5)))
        custom = Sampling(0.5, 0.9, 40, 1.1, max_tokens=6, stop_ids=frozenset({9, 4}), seed=3)
        list(engine.submit([1, 2], custom, logprobs=4))
    plain, asked = server.asked
    assert server.paths == ["/v1/completions"] * 2
    assert plain["prompt"] == [1, 2]
    assert plain["stream"] is plain["return_token_ids"] is True
    assert (plain["temperature"], plain["top_p"], plain["top_k"], plain["repetition_penalty"]) == (1.0, 1.0, -1, 1.0)
    assert "seed" not in plain
    assert (asked["temperature"], asked["top_p"], asked["top_k"], asked["repetition_penalty"]) == (0.5, 0.9, 40, 1.1)
    assert (asked["max_tokens"], asked["stop_token_ids"], asked["seed"], asked["logprobs"]) == (6, [4, 9], 3, 4)


def test_scores_are_those_of_the_engine_behind(nano: tuple[Engine, Tokenizer]):
    """Choice evaluations compare scores; one that is shifted by a place turns them into noise."""
    local, tok = nano
    row = prompt(tok)[:20]
    with FakeServer(completes(local), repeats=True) as server, RemoteEngine(server.url) as engine:
        assert engine.score(row) == pytest.approx(local.score(row))
        assert engine.score(row[:1]) == []
    with (
        FakeServer([completion(1, finish="length")]) as server,
        RemoteEngine(server.url) as engine,
        pytest.raises(EngineError, match="does not score prompts; it sent 0 of 19 scores"),
    ):
        engine.score(row)


def test_a_server_that_knows_no_stop_ids_is_stopped_here():
    """llama.cpp takes no `stop_token_ids`: the model would go on, and play the user."""
    got = answered([completion(5), completion(6, 9, 7), completion(8), completion(8, finish="length")])
    assert got == ([5, 6, 9], "stop")
    assert answered([completion(*range(20, 40))]) == (list(range(20, 28)), "length")


def test_the_stop_id_is_the_last_token_whether_the_server_counts_it_or_not():
    """Without it the turn loop believes that the answer was cut."""
    for events in (
        [completion(5), completion(9, finish="stop", stop_reason=9)],
        [completion(5), completion(finish="stop", stop_reason=9)],
        [completion(5, finish="stop", matched_stop=9)],
    ):
        assert answered(events) == ([5, 9], "stop")
    assert answered([completion(5), completion(4, finish="stop")]) == ([5, 4], "stop")  # an end of its own


def test_a_logprob_that_is_not_told_is_no_number():
    """A made-up 0.0 would say that the model was certain."""
    with FakeServer([completion(5, finish="length")]) as server, RemoteEngine(server.url) as engine:
        assert math.isnan(next(engine.submit([1], KEEP)).logprob)


def test_many_requests_at_once():
    """A stream that only runs while it is read would make a batch a queue."""
    all_here = threading.Barrier(20, timeout=60)

    def reply(request: Request) -> None:
        all_here.wait()
        request.stream([completion(request.body["prompt"][0], 9, finish="stop")])

    with FakeServer(reply, repeats=True) as server, RemoteEngine(server.url) as engine:
        streams = [engine.submit([n + 10], KEEP) for n in range(20)]
        assert [ids(list(stream)) for stream in streams] == [[n + 10, 9] for n in range(20)]


# --------------------------------------------------------------------------------------------------- ends and cuts


def waits(*events: Any) -> Reply:
    """Say this, then nothing more."""

    def reply(request: Request) -> None:
        if events:
            request.open()
        for event in events:
            request.event(event)
        request.wait_until_left()

    return reply


@pytest.mark.parametrize("events", [[], [completion(5), completion(6)]], ids=["before the answer", "in the middle"])
def test_cancelling_closes_the_connection(events: list[Any]):
    """A server that is not told goes on computing for nobody, and pays for it with everybody's time."""
    with FakeServer(waits(*events)) as server, RemoteEngine(server.url) as engine:
        stream = engine.submit([1], KEEP)
        got = [next(stream).id for _ in events]
        assert server.waits.wait(60)
        stream.cancel()
        assert server.left.wait(60)
        assert ids(list(stream)) == []
        assert (got, stream.finish) == ([5, 6][: len(events)], "cancelled")
        stream.cancel()


def test_time_is_over():
    """`time_limit` is a promise to the caller, whatever the server does."""
    with FakeServer(waits(completion(5))) as server, RemoteEngine(server.url) as engine:
        stream = engine.submit([1], Sampling(time_limit=0.2))
        assert (ids(list(stream)), stream.finish) == ([5], "time")
        assert server.left.wait(60)


def test_closing_ends_everything():
    """A reader that waits for a closed engine would wait for ever."""
    with FakeServer(waits(completion(5)), waits()) as server:
        engine = RemoteEngine(server.url)
        streams = [engine.submit([1], KEEP), engine.submit([2], KEEP)]
        engine.close()
        engine.close()
        for stream in streams:
            assert set(ids(list(stream))) <= {5}
            assert stream.finish == "cancelled"
        streams[0].cancel()
        engine.forget("a")
        with pytest.raises(EngineError, match="the engine is closed"):
            engine.submit([1], KEEP)


# ------------------------------------------------------------------------------------------------------- failures


def broken(*events: Any) -> Reply:
    """A stream whose connection is lost in the middle of a piece."""

    def reply(request: Request) -> None:
        request.protocol_version = "HTTP/1.1"
        request.send_response(200)
        request.send_header("Content-Type", "text/event-stream")
        request.send_header("Transfer-Encoding", "chunked")
        request.end_headers()
        for event in events:
            data = f"data: {json.dumps(event)}\n\n".encode()
            request.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        request.wfile.write(b"ff\r\ndata: {")
        request.close_connection = True

    return reply


def ends_early(request: Request) -> None:
    request.open()
    request.event(completion(5))


def refuses(status: int, body: Any) -> Reply:
    return lambda request: request.refuse(status, body)


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (refuses(400, {"error": {"message": "max_tokens is\ntoo large", "code": 400}}), "URL answered 400: max_tokens"),
        (refuses(401, {"error": "Unauthorized"}), "URL answered 401: Unauthorized; put the server's key into"),
        (refuses(404, {"message": "The model `x` does not exist."}), "does not exist.; is this the server's address"),
        (refuses(422, {"detail": [{"msg": "prompt: bad"}]}), "URL answered 422: [{'msg': 'prompt: bad'}]"),
        (refuses(429, {"error": {"message": "busy"}}), "URL answered 429: busy; try again in a while"),
        (refuses(500, [1]), "URL answered 500: [1]"),
        (lambda request: request.send(502, "text/html", b"<h1>Bad\nGateway</h1>"), "502: <h1>Bad Gateway</h1>"),
        (lambda request: request.send(503, "text/plain", b""), "URL answered 503: without a word; try again"),
        (lambda request: request.send(200, "application/json", b"{}"), "URL does not stream its answer"),
        (lambda request: request.send(200, "text/html", b"<html>"), "URL does not stream its answer"),
        ([{"error": {"message": "CUDA out of memory"}}], "URL failed: CUDA out of memory"),
        (["{not json"], "URL sent something else than an answer (JSONDecodeError"),
        (["[" * 100_000], "URL sent something else than an answer"),
        (["5"], "URL sent something else than an answer"),
        ([{"choices": 5}], "URL sent something else than an answer"),
        ([{"choices": [{"token_ids": ["a"]}]}], "URL sent something else than an answer"),
        ([{"choices": [{"text": "hi", "finish_reason": None}]}], "sends text but no token ids; talk to it as a chat"),
        ([completion(5, finish="content_filter")], "the server ended the answer itself: content_filter"),
        ([completion(5)], "URL broke off its answer"),
        (ends_early, "URL broke off its answer"),
        (broken(completion(5)), "URL broke off its answer (RemoteProtocolError: peer closed"),
        (lambda request: request.connection.close(), "URL broke off its answer"),
        (["x" * 2**21], "URL does not stream its answer (SSEError: Server-sent event exceeded"),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_one_line(reply: Any, words: str):
    """A traceback of a library, or an answer that ends as if it were whole, helps nobody."""
    assert words in failure(reply)


def test_tokens_before_a_failure_are_delivered():
    """What the user has already been promised must not vanish with the connection."""
    with FakeServer(broken(completion(5), completion(6))) as server, RemoteEngine(server.url) as engine:
        stream = engine.submit([1], KEEP)
        assert [next(stream).id, next(stream).id] == [5, 6]
        with pytest.raises(EngineError, match="broke off its answer"):
            next(stream)
        assert stream.finish is None


def test_a_connection_that_is_lost_after_the_last_token_costs_nothing():
    """The answer is whole; the usage that would have followed is no reason to throw it away."""
    assert answered(broken(completion(5), completion(9, finish="stop"))) == ([5, 9], "stop")


def test_a_silent_server_is_given_up():
    """A server that hangs must not hang the chat."""
    assert failure(waits(), patience=0.2) == "URL took the request, but sent nothing for too long (ReadTimeout)"


def test_ids_of_another_vocabulary_are_refused():
    """An id that the tokenizer does not have would be a crash, or another word, in the reader."""
    assert "id 70 in the answer is not in the vocabulary of 50" in failure([completion(70)], vocab_size=50)
    with FakeServer() as server, RemoteEngine(server.url, vocab_size=50) as engine:
        with pytest.raises(ValueError, match="id 50 in the prompt is not in the vocabulary of 50"):
            engine.submit([50], KEEP)
        with pytest.raises(ValueError, match="id -1 in what is to be scored"):
            engine.score([1, -1])
    assert server.asked == []


@pytest.mark.parametrize(
    ("prompt", "sampling", "words"),
    [
        ([], KEEP, "the prompt is empty"),
        ([1] * 64, KEEP, "the prompt has 64 tokens; at most 63 fit"),
        ([1], Sampling(length_penalty=1.1), "length_penalty is 1.1; no server knows it"),
    ],
)
def test_a_prompt_that_cannot_be_completed_is_refused_at_once(prompt: list[int], sampling: Sampling, words: str):
    """As by the local engine, so that callers need to know one set of errors."""
    models = [{"id": "m", "max_model_len": 64}]
    with (
        FakeServer(models=models) as server,
        RemoteEngine(server.url) as engine,
        pytest.raises(ValueError, match=re.escape(words)),
    ):
        engine.submit(prompt, sampling)


def test_a_grammar_is_refused(nano: tuple[Engine, Tokenizer]):
    """Silently dropped, whoever relied on it would read calls of tools that are switched off."""
    with (
        FakeServer() as server,
        RemoteEngine(server.url) as engine,
        pytest.raises(ValueError, match="a grammar is given; no server knows it, so leave it out"),
    ):
        engine.submit([1], KEEP, grammar=commands_grammar(nano[1], {}))
    assert server.asked == []


# ------------------------------------------------------------------------------------------- finding the server


def test_length_comes_from_the_server():
    """vLLM refuses a request whose prompt and `max_tokens` together are longer than the model."""
    models = [{"id": "other"}, {"id": "m", "max_model_len": 64}]
    with FakeServer([completion(9, finish="stop")], models=models) as server:
        with RemoteEngine(server.url, "m") as engine:
            assert engine.max_length == 64
            list(engine.submit([1] * 60, KEEP))
            assert server.asked[0]["max_tokens"] == 4
        with RemoteEngine(server.url, "m", max_length=32) as engine:
            assert engine.max_length == 32
        with RemoteEngine(server.url, "other") as engine:
            assert engine.max_length == 2048


def test_the_model_is_named_where_it_is_not_clear():
    """The only model needs no name; among several a guess would answer with the wrong one."""
    with FakeServer() as server, RemoteEngine(server.url) as engine:
        assert engine.name == "m"
    with FakeServer(models=[{"id": "a"}, {"id": "b"}]) as server, pytest.raises(ValueError, match=r"#name \(a, b\)"):
        RemoteEngine(server.url)
    with FakeServer(models=None) as server:
        with pytest.raises(ValueError, match="does not list them"):
            RemoteEngine(server.url)
        with RemoteEngine(server.url, "x") as engine:
            assert engine.name == "x"
    with FakeServer(models=[7]) as server, pytest.raises(EngineError, match="sent something else than an answer"):
        RemoteEngine(server.url)


def test_nobody_is_there():
    """The first thing that goes wrong: the server is not running."""
    with FakeServer() as server:
        pass
    before = threading.active_count()
    with pytest.raises(EngineError, match=rf"{server.url} does not answer; is the server running\? \(ConnectError"):
        RemoteEngine(server.url, "m")
    assert threading.active_count() == before


@pytest.mark.parametrize("address", ["", "host", "ftp://host/v1", "http://", "http://host:port/v1", "/v1"])
def test_what_is_no_address(address: str):
    """A typing mistake must not end in a library's traceback."""
    with pytest.raises(ValueError, match="is no address of a server; write http://host:port/v1"):
        RemoteEngine(address, "m")


def test_the_key_goes_to_the_server_and_nowhere_else(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    """A key in an error message ends up in a bug report."""
    caplog.set_level("DEBUG")
    monkeypatch.setenv(KEY, "sk-secret\n")
    words = failure(refuses(401, {"error": {"message": "Incorrect API key provided: sk-secret"}}))
    assert words.startswith("URL answered 401: Incorrect API key provided: ***; put")
    with FakeServer([completion(9, finish="stop")]) as server, RemoteEngine(server.url) as engine:
        list(engine.submit([1], KEEP))
        assert "secret" not in repr(engine)
    assert [headers["Authorization"] for headers in server.headers] == ["Bearer sk-secret"] * 2
    assert "secret" not in caplog.text
    for address in ("http://me:sk-secret@host/v1", "http://host/v1?key=sk-secret"):
        with pytest.raises(ValueError, match="no password and no query; the key goes into MOSS_API_KEY") as caught:
            RemoteEngine(address, "m")
        assert "secret" not in str(caught.value)
    monkeypatch.setenv(KEY, "sk-sécret")
    with pytest.raises(ValueError, match="MOSS_API_KEY holds characters that no key has"):
        RemoteEngine(server.url, "m")


def test_without_a_key_none_is_sent(monkeypatch: pytest.MonkeyPatch):
    """An empty `Bearer` is refused by some servers."""
    monkeypatch.delenv(KEY, raising=False)
    with FakeServer() as server, RemoteEngine(server.url):
        assert "Authorization" not in server.headers[0]
