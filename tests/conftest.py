"""What holds for every test."""

import signal

import pytest

# A shell that runs the suite in the background makes it ignore Ctrl-C, and the programs that tests start inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    """How long the hammering is; `make soak` gives a larger number."""
    parser.addoption("--repeats", type=int, default=5, help="how often tests marked `repeated` do what they repeat")


@pytest.fixture
def repeats(request: pytest.FixtureRequest) -> int:
    """How often to repeat: `--repeats`."""
    return request.config.getoption("--repeats")


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """An open store on each kind of database, made once for the tests of a file."""
    from moss.serve.store.database import Database  # only tests of the service pay for the import
    from tests.stores import place

    with place(request.param, tmp_path_factory.mktemp("store")) as url, Database.open(url) as store:
        yield store


@pytest.fixture
def store(opened):
    """A store with nothing in it."""
    from tests.stores import empty

    yield opened
    empty(opened)
