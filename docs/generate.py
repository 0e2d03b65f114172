"""Write what the documents hold of code and measurements, so that they cannot drift from either.

docs/commands.md (the help of every command) and tests/flags.txt (the pinned list of flags) are made from the commands'
dataclasses; a table between `<!-- figures: NAME -->` and `<!-- end of figures -->` on any page is made from
benchmarks/results/. `--check` writes nothing and says what is stale; the tests call it.

    make docs                          # or: python -m docs.generate [--check]
"""

from __future__ import annotations

import difflib
import json
import re
import sys
from pathlib import Path
from statistics import median
from typing import Any

from moss.__main__ import VERBS, find
from moss.config import build_parser, flags

ROOT = Path(__file__).parent.parent


def commands_page() -> str:
    """docs/commands.md: one section a verb, holding exactly what `--help` prints."""
    parts = [
        "# Commands\n",
        "<!-- made by `make docs` from the commands' dataclasses; edit those -->\n",
        "`moss --help` lists the commands; `moss COMMAND --help` prints what stands here. Every command takes"
        " `--config FILE`, a JSON or YAML file with values for its flags (names with `_` for `-`); flags on the"
        " command line win over it. Exit codes: 0 success, 1 an error in the input or the system, said in one line"
        " on standard error, 2 bad usage, 130 stopped with Ctrl-C, 141 the reader of the output has left (as `head`"
        " does), 143 stopped by SIGTERM (a training saves its step and exits with 0).\n",
    ]
    for verb, target in VERBS.items():
        command, _ = find(target)
        text = build_parser(command, prog=f"moss {verb}").format_help().strip()
        parts.append(f"## moss {verb}\n\n```\n{text}\n```\n")
    return "\n".join(parts)


def flags_list() -> str:
    """tests/flags.txt: a line for each flag of each command."""
    lines = []
    for verb, target in VERBS.items():
        lines += [f"moss {verb} {name}" for name in flags(find(target)[0]) if name not in ("-h/--help", "--config")]
    return "\n".join(lines) + "\n"


def result(name: str) -> dict[str, Any]:
    """What a benchmark wrote."""
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def nano_table() -> str:
    """Every set and metric of the bundled model, per cent with 95 % interval, the languages side by side."""
    lines = ["| set | measure | English | 中文 | questions | goal |", "|---|---|---|---|---|---|"]
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in result("nano")["rows"]:
        found.setdefault((row["set"], row["metric"]), {})[row["lang"]] = row
    for (name, metric), by_lang in found.items():
        cells = [
            f"{row['value'] * 100:.1f} ({row['low'] * 100:.1f}–{row['high'] * 100:.1f})" if row else ""
            for row in (by_lang.get("en"), by_lang.get("zh"))
        ]
        sizes = " / ".join(str(row["n"]) for row in by_lang.values())
        target = next(iter(by_lang.values()))["target"]
        goal = f"{'≥' if target[0] == '>' else '≤'} {float(target[2:]) * 100:g}" if target else ""
        lines.append(f"| {name} | {metric} | {' | '.join(cells)} | {sizes} | {goal} |")
    for name, row in result("nano")["gsm8k"].items():
        told = f"{row['value'] * 100:.1f} ({row['low'] * 100:.1f}–{row['high'] * 100:.1f})"
        lines.append(f"| gsm8k | {name} | {told} |  | {row['n']} |  |")
    return "\n".join(lines)


def switches_table() -> str:
    """What the switches do to the bundled model and what its tools bring, beside the paper's figure 10."""
    lines = ["| measure | English | 中文 | paper, both languages |", "|---|---|---|---|"]
    published = {"calculator: called when on": 89.2, "calculator: called when off": 28.67}
    published |= {"solver: called when on": 52.3, "solver: called when off": 7.7}
    by_lang = result("nano")["switches"]
    for name in by_lang["en"]:
        cells = [
            f"{at[name]['value'] * 100:.1f} ({at[name]['low'] * 100:.1f}–{at[name]['high'] * 100:.1f})"
            for at in by_lang.values()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} | {published.get(name, '')} |")
    return "\n".join(lines)


def human_pairs_table() -> str:
    """Held-out pairs of people that a scorer orders as they did."""
    found = result("human_pairs")
    pairs = sum(fold["pairs"] for fold in found["folds"])
    lines = [f"| scorer | ordered as people did, of {pairs:,} held-out pairs |", "|---|---|"]
    for name, (share, low, high) in found["pooled"].items():
        lines.append(f"| {name} | {share:.1%} ({low:.1%} to {high:.1%}) |")
    return "\n".join(lines)


def harness_table() -> str:
    """Scores and speed of evaluations beside lm-evaluation-harness and a plain loop."""
    found = result("harness")
    lines = ["| set | questions | scores | furthest apart | other choices |", "|---|---|---|---|---|"]
    for name, row in found["compared"].items():
        lines.append(f"| {name} | {row['questions']:,} | {row['scores']:,} | {row['apart']:.1e} | {row['other']} |")
    lines += ["", "| questions a second | median | of the slowest |", "|---|---|---|"]
    slowest = min(found["questions_per_s"].values())
    for name, rate in found["questions_per_s"].items():
        lines.append(f"| {name} | {rate:.1f} | {rate / slowest:.1f} |")
    return "\n".join(lines)


def speed_table() -> str:
    """What a user waits for: start of the program, first output, one call of each tool."""
    startup, tools = result("startup"), result("tools")
    rows = [
        ("`moss --help`, whole command", f"{startup['help']['end_median_s']:.2f} s", "< 0.5 s", startup),
        (
            '`moss chat -p "What is 37*12?"`, first output',
            f"{startup['chat']['first_byte_median_s']:.2f} s",
            "< 3 s",
            startup,
        ),
        ("one calculation, isolated", f"{tools['calculator']['median_ms']:.1f} ms", "≤ 3 ms", tools),
        ("one equation, isolated", f"{tools['solver']['median_ms']:.1f} ms", "≤ 20 ms", tools),
    ]
    lines = ["| what | median | goal | load of the machine |", "|---|---|---|---|"]
    lines += [f"| {what} | {value} | {goal} | {at['load_before'][0]:.1f} |" for what, value, goal, at in rows]
    return "\n".join(lines)


FAMILIES = "llama", "moss"  # of the decode benchmark


def decode_table() -> str:
    """Every width of both families: shares of the bound, tokens a second, and the second turn."""
    decode = result("decode")
    head = "linear layers | whole step | tokens/s, 1 / 2 / 4 / 8 at once | prompt, tokens/s | second turn"
    lines = [f"| family | weights | {head} |", "|---|---|---|---|---|---|---|"]
    for family, width, row in ((name, *pair) for name in FAMILIES for pair in decode[name].items()):
        step, turn = row["step"], row["step"]["second_turn"]
        shares = (f"{median(part['shares']):.0%}" for part in (row["linears"], step))
        rates = [median(step["tokens_per_s"]), *step["streams_tokens_per_s"].values()]
        prompt = f"{median(step['prefill_tokens_per_s']):.0f}"
        times = f"{turn['remembered_s']:.2f} s remembered, {turn['read_again_s']:.2f} s read again"
        cells = (*shares, " / ".join(f"{rate:.0f}" for rate in rates), prompt, times)
        lines.append(f"| {family} | {width} | {' | '.join(cells)} |")
    return "\n".join(lines)


def ratios_table() -> str:
    """Our rates to those of others, measured in the same rounds."""
    decode = result("decode")
    lines = ["| weights | ratio | llama | moss |", "|---|---|---|---|"]
    for width, row in decode[FAMILIES[0]].items():
        for name in row["ratios"]:
            cells = (decode[family][width]["ratios"].get(name) for family in FAMILIES)
            told = ("" if cell is None else f"{cell:.2f}" for cell in cells)
            lines.append(f"| {width} | {name} | {' | '.join(told)} |")
    return "\n".join(lines)


def grammar_table() -> str:
    """What a grammar adds to a decode step of the bundled model."""
    found = result("grammar")
    engine = found["engine"]
    lines = [f"| a token | it takes longer by | of a step of {engine['without_us']:.0f} µs |", "|---|---|---|"]
    for kind in ("greedy", "drawn"):
        mean = found["model"][f"{kind}_us"]["mean"]
        lines.append(f"| {kind}, the grammar's work by itself | {mean:.1f} µs | {mean / engine['without_us']:.1%} |")
    low, high = engine["quartiles_percent"]
    longer = f"{engine['with_us'] - engine['without_us']:.0f} µs"
    lines.append(f"| greedy, whole answers | {longer} | {engine['percent']:.1f}% (quartiles {low:.1f} to {high:.1f}) |")
    return "\n".join(lines)


def lookup_table() -> str:
    """Speed with guesses from the prompt to speed without, a set of questions a row."""
    lines = [
        "| questions | tokens | guessed | right | speed with lookup to speed without (rounds) |",
        "|---|---|---|---|---|",
    ]
    for name, row in result("lookup")["sets"].items():
        cells = (name, *(row[key] for key in ("tokens", "drafted", "accepted")))
        rounds = f"{min(row['rounds']):.2f} to {max(row['rounds']):.2f}"
        lines.append(f"| {' | '.join(map(str, cells))} | {row['speed_with_lookup_to_without']:.2f} ({rounds}) |")
    return "\n".join(lines)


def preference_table() -> str:
    """What is right in the answers of each arm, and how often it beats fine-tuning; all seeds together."""
    found = result("preference")
    many = len(found["seeds"]) * found["questions"]
    lines = [f"| {many} answers | drawn | right | better than `sft` |", "|---|---|---|---|"]
    for drawn, pooled in found["pooled"].items():
        for arm, (right, low, high) in pooled["right"].items():
            won = pooled["versus"].get(f"{arm} over sft")
            told = f"{won['rate']:.1%} ({won['low']:.1%} to {won['high']:.1%})" if won else ""
            lines.append(f"| `{arm}` | {drawn} | {right:.1%} ({low:.1%} to {high:.1%}) | {told} |")
    return "\n".join(lines)


def dial_table() -> str:
    """What is right in the answers of `moss train pat` at each tag."""
    pooled = result("preference")["pooled"]
    tags = next(iter(pooled.values()))["dial"]
    lines = [f"| right at quality | {' | '.join(tags)} |", "|---" * (len(tags) + 1) + "|"]
    for name, each in pooled.items():
        lines.append(f"| {name} | " + " | ".join(f"{each['dial'][tag]:.1%}" for tag in tags) + " |")
    return "\n".join(lines)


def train_table() -> str:
    """Training on a CPU beside TRL: tokens a second, and how many times that of each arm ours is."""
    arms = result("train")["arms"]
    lines = [
        "| way | numbers | tokens/s | ours to it | peak memory | of the matrix rate |",
        "|---|---|---|---|---|---|",
    ]
    for key, arm in arms.items():
        name, dtype = key.rsplit(" ", 1)
        ratio = arms[f"moss {dtype}"]["tokens_per_s"] / arm["tokens_per_s"]
        share = f"{arm['matmul_share']:.0%}" if "matmul_share" in arm else ""
        speed, peak = f"{arm['tokens_per_s']:.0f}", f"{arm['peak_bytes'] / 1e9:.2f} GB"
        lines.append(f"| {name} | {dtype} | {speed} | {ratio:.2f} | {peak} | {share} |")
    return "\n".join(lines)


def parity_table() -> str:
    """One step of TRL's beside one of ours: how far losses and gradients are apart, and what rounding alone does."""
    lines = [
        "| objective | TRL's | loss | losses differ by | gradients differ by | rounding |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in result("parity")["objectives"].items():
        apart = (f"{row[key]:.1e}" for key in ("loss_apart", "gradient_apart", "gradient_rounding"))
        lines.append(f"| {name} | {row['trainer']} | {row['loss']:.6f} | {' | '.join(apart)} |")
    return "\n".join(lines)


def plan_table() -> str:
    """What `--plan` says of memory and time, beside what runs took."""
    lines = ["| model | numbers | compiled | planned | taken | off | a step planned | taken | off |", "|---" * 9 + "|"]
    for row in result("plan")["rows"]:
        cells = [row["case"], row["dtype"], "yes" if row["compile"] else "no"]
        cells += [f"{row[name]:.0f} MB" for name in ("planned_mb", "taken_mb")] + [f"{row['memory_off']:+.1%}"]
        cells += [f"{row[name]:.2f} s" for name in ("planned_s", "taken_s")] + [f"{row['time_off']:+.1%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def search_table() -> str:
    """What a local search costs, and how often it finds and keeps the answer."""
    found = result("search")
    index, summary, memory = found["index"], found["summary"], found["memory_mib"]
    lines = ["| what | measured | goal |", "|---|---|---|"]
    for key, name in (("search_words", "words of a page"), ("search_questions", "questions of people")):
        what = f"a search of {index['pages']:,} own pages and the encyclopaedia, {name}, median"
        lines.append(f"| {what} | {index[key]['median_ms']:.1f} ms | ≤ 10 ms |")
    lines.append(f"| of it the index alone, words of a page, median | {index['index_alone']['median_ms']:.1f} ms | |")
    for lang, name in (("en", "English"), ("zh", "Chinese")):
        lines.append(f"| summary of a page of 3,000 words, {name} | {summary[lang]['median_ms']:.0f} ms | ≤ 50 ms |")
    lines.append(f"| memory, with the process that reads pages | {sum(memory.values()):.0f} MiB | < 300 MB |")
    for group, about in found["quality"]["test"].items():
        goal = "≥ 90 %" if group == "all" else ""
        name = f"{about['questions']} questions, {group}"
        lines.append(f"| {name}: right page among three | {about['right_page_in_top_3'] * 100:.1f} % | {goal} |")
        lines.append(f"| {name}: summary keeps the answer | {about['summary_keeps_answer'] * 100:.1f} % | {goal} |")
    return "\n".join(lines)


TABLES = {
    "search": search_table,
    "plan": plan_table,
    "preference": preference_table,
    "dial": dial_table,
    "train": train_table,
    "parity": parity_table,
    "nano": nano_table,
    "switches": switches_table,
    "harness": harness_table,
    "human_pairs": human_pairs_table,
    "speed": speed_table,
    "decode": decode_table,
    "ratios": ratios_table,
    "grammar": grammar_table,
    "lookup": lookup_table,
}
FIGURES = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end of figures -->)", re.S)


def with_figures(page: str) -> str:
    """A page with its tables of figures as the results have them."""
    return FIGURES.sub(lambda m: f"{m[1]}{TABLES[m[2]]()}\n{m[3]}", page)


def documents() -> dict[Path, str]:
    """Every generated file, and every page with figures, as it should be."""
    made = {ROOT / "docs/commands.md": commands_page(), ROOT / "tests/flags.txt": flags_list()}
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("moss/models/*/*.md")]:
        text = path.read_text(encoding="utf-8")
        if FIGURES.search(text):
            made[path] = with_figures(text)
    return made


def main(argv: list[str]) -> int:
    stale = 0
    for path, text in documents().items():
        old = path.read_text(encoding="utf-8") if path.exists() else ""
        if "--check" in argv:
            stale += old != text
            name = str(path.relative_to(ROOT))
            sys.stdout.writelines(difflib.unified_diff(old.splitlines(True), text.splitlines(True), name, "now"))
        else:
            path.write_text(text, encoding="utf-8")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
