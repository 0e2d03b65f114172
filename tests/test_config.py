"""A command's dataclass as flags, help and JSON."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from moss.config import build_parser, field_docs, flags, from_json, option, parse, to_json
from moss.errors import UsageError


@dataclass(frozen=True)
class Sample:
    """Do a thing."""

    source: Path  # what to read
    # a section heading, not this field's text
    prompt: str | None = option(None, short="-p")  # ask this once
    # half of the sentence
    # and the other half, 100 % of it
    max_tokens: int = 512
    temperature: float = 0.7
    "0 = greedy"
    to: Literal["moss", "openai"] = "moss"  # target form
    json: bool = False  # for programs
    compile: bool = True  # leave torch.compile out
    quality: int | None = None  # 0 to 100
    layers: list[int] = option(lambda: [1, 2])  # which ones


def test_defaults_and_types_come_from_the_fields():
    """A flag parsed as text where the field says int would surface only deep inside a run."""
    config = parse(Sample, ["in.json"], prog="moss sample")
    assert config == Sample(Path("in.json"))
    assert isinstance(config.source, Path)
    config = parse(
        Sample,
        "in.json --max-tokens 7 --json --no-compile --quality 80 --layers 3 4 --to=openai".split(),
        prog="moss sample",
    )
    assert (config.max_tokens, config.json, config.compile, config.quality, config.layers, config.to) == (
        7,
        True,
        False,
        80,
        [3, 4],
        "openai",
    )


@pytest.mark.parametrize("text", ["null", "-3+4", "1e3", "yes", "{a: 1", "'q'", "-x", "2026-01-01", "", " 你好 "])
def test_a_text_stays_the_text_that_was_typed(text: str):
    """YAML reading turned the question "null" into nothing, and "-3+4" was taken for a flag."""
    assert parse(Sample, ["in.json", "-p", text], prog="moss").prompt == text


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["source", "required"]),
        (["a", "--quality", "x"], ["--quality", "int", "'x'"]),
        (["a", "--temperature", "warm"], ["--temperature", "float", "'warm'"]),
        (["a", "--to", "yours"], ["--to", "moss", "openai", "'yours'"]),
        (["a", "--temprature", "1"], ["--temprature", "did you mean --temperature?"]),
        (["a", "b"], ["b"]),
        (["a", "-p"], ["-p"]),
        (["a", "--config", "nowhere.json"], ["nowhere.json"]),
    ],
)
def test_bad_usage_is_one_line_with_the_value_and_the_way_out(argv: list[str], words: list[str]):
    """Parser errors of six lines, or tracebacks, hide which flag was wrong."""
    with pytest.raises(UsageError) as caught:
        parse(Sample, argv, prog="moss sample")
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith("see moss sample --help")
    for word in words:
        assert word in message


def test_config_file_gives_values_and_flags_override_it(tmp_path: Path):
    """A config key that is misspelt must not be ignored, and a flag must win over the file."""
    path = tmp_path / "run.json"
    path.write_text('{"max_tokens": 9, "temperature": 0}')
    config = parse(Sample, ["in.json", "--config", str(path), "--max-tokens", "8"], prog="moss")
    assert (config.max_tokens, config.temperature) == (8, 0.0)
    path.write_text('{"temperatur": 0}')
    with pytest.raises(UsageError, match="temperatur"):
        parse(Sample, ["in.json", "--config", str(path)], prog="moss")


def test_a_switch_in_a_file_is_true_or_false(tmp_path: Path):
    """The text "false" in a config file is no empty text, and so it meant yes."""
    path = tmp_path / "run.json"
    path.write_text('{"json": "false"}')
    with pytest.raises(UsageError, match="json: expected true or false, got 'false'"):
        parse(Sample, ["in.json", "--config", str(path)], prog="moss")
    path.write_text('{"json": true}')
    assert parse(Sample, ["in.json", "--config", str(path)], prog="moss").json is True


def test_json_round_trip_and_unknown_keys():
    """A run's JSON has to give back the same settings, and a key of another version has to be named."""
    config = Sample(Path("x"), quality=20, layers=[5])
    values = to_json(config)
    assert values["source"] == "x"
    assert from_json(Sample, values) == config
    with pytest.raises(UsageError, match="speed"):
        from_json(Sample, {**values, "speed": 1})


def test_help_is_what_the_source_says_beside_the_field():
    """Help that is written a second time drifts from the code; a heading comment is not a field's help."""
    assert field_docs(Sample) == {
        "source": "what to read",
        "prompt": "ask this once",
        "max_tokens": "half of the sentence and the other half, 100 % of it",
        "temperature": "0 = greedy",
        "to": "target form",
        "json": "for programs",
        "compile": "leave torch.compile out",
        "quality": "0 to 100",
        "layers": "which ones",
    }
    text = build_parser(Sample, prog="moss sample").format_help()
    assert "Do a thing." in text
    assert "-p, --prompt PROMPT" in text
    assert "100 % of it (default: 512)" in " ".join(text.split())


def test_flag_names():
    """Flags are what users type and scripts hold: their spelling is an interface."""
    assert flags(Sample) == [
        "-h/--help",
        "source",
        "-p/--prompt",
        "--max-tokens",
        "--temperature",
        "--to",
        "--json",
        "--no-compile",
        "--quality",
        "--layers",
        "--config",
    ]
