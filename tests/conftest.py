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
