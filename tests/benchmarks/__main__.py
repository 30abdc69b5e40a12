"""Run every benchmark and write tests/benchmarks/RESULTS.md and results.jsonl.

    python -m tests.benchmarks [NAME ...]

Without names it leaves out what takes hours (`tokens`); what was measured of that stays in the results. Each benchmark
is a module `bench_NAME` beside this file that prints one JSON object a line: `benchmark`, `case`, `ratio` (this
project's cost over the other's; below 1 is cheaper), `against`, and more figures.
"""

import argparse
import ast
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
_HOURS = {"tokens"}
_ABOUT = {"benchmark", "command", "machine", "date"}


def machine() -> str:
    """Describe this machine in one line."""
    import torch

    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    return f"{cpu}, {os.cpu_count()} cores{gpu}; Python {platform.python_version()}, torch {torch.__version__}"


def measure(name: str, options: list[str]) -> list[dict[str, object]]:
    """Run one benchmark in its own process and return what it printed, with what it ran on."""
    command = [sys.executable, "-m", f"tests.benchmarks.bench_{name}", *options]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    ran = {
        "command": f"python -m tests.benchmarks.bench_{name} {' '.join(options)}".strip(),
        "machine": machine(),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }
    return [json.loads(line) | ran for line in done.stdout.splitlines() if line.startswith("{")]


def keep(measured: list[dict[str, object]]) -> list[dict[str, object]]:
    """Write the rows into the results, in place of older ones of the same benchmarks; return all."""
    results = HERE / "results.jsonl"
    kept = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    replaced = {row["benchmark"] for row in measured}
    rows = sorted(
        [row for row in kept if row["benchmark"] not in replaced] + measured, key=lambda row: row["benchmark"]
    )
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (HERE / "RESULTS.md").write_text(
        "# Measurements\n\n"
        "Ratios are this project's cost over the other's in the same run on the same machine: below 1 is cheaper.\n"
        "`make bench` measures again. Without a GPU absolute times are left out, but for the embedded model that is "
        "made for a CPU.\n\n"
        f"{table(rows)}"
    )
    return rows


def table(rows: list[dict[str, object]]) -> str:
    """Return the rows as Markdown, one table a benchmark."""
    parts = []
    for benchmark in dict.fromkeys(row["benchmark"] for row in rows):
        chosen = [row for row in rows if row["benchmark"] == benchmark]
        first = chosen[0]
        timed = "no GPU" not in str(first["machine"])
        columns = [key for key in first if key not in _ABOUT and (timed or not key.endswith("_s"))]
        parts.append(f"## {benchmark}\n\n{_docstring(str(first['command']))}\n")
        parts.append(f"Measured {first['date']} with `{first['command']}` on: {first['machine']}.\n")
        parts.append("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
        parts.extend("| " + " | ".join(_shown(row.get(column)) for column in columns) + " |" for row in chosen)
        parts.append("")
    return "\n".join(parts)


def _docstring(command: str) -> str:
    """Return what the module of a command says of itself: what is measured, and what the columns mean."""
    module = command.split()[2].rpartition(".")[2]
    return ast.get_docstring(ast.parse((HERE / f"{module}.py").read_text())) or ""


def _shown(value: object) -> str:
    match value:
        case None:
            return ""
        case float():
            return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
        case _:
            return str(value)


def main() -> None:
    every = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))
    parser = argparse.ArgumentParser(description="Run the benchmarks.")
    parser.add_argument(
        "names", nargs="*", default=sorted(set(every) - _HOURS), metavar="NAME", help=f"of: {', '.join(every)}"
    )
    names = parser.parse_args().names
    if unknown := sorted(set(names) - set(every)):
        parser.error(f"unknown: {', '.join(unknown)}; there are: {', '.join(every)}")
    rows: list[dict[str, object]] = []
    for name in names:
        print(f"measuring {name} ...", flush=True)
        rows = keep(measure(name, []))  # at once: a later benchmark that fails loses nothing
    print(table(rows))


if __name__ == "__main__":
    main()
