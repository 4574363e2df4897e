"""The README's tables, generated from the committed results, and a plot beside each.

The table of the shipped kernels, between `<!-- begin:kernels -->` and `<!-- end:kernels -->`, comes from the library's records.
Every other table stands between `<!-- begin:operators -->` and `<!-- end:operators -->` (and `rows`, `models`, `kernelbench`,
`overhead`); it holds one section per device kind that has a result file under `benchmarks/results/`, and is empty while there
is none.

    python benchmarks/readme_tables.py            write README.md and the plots
    python benchmarks/readme_tables.py --check    exit with 1 if they do not agree with the results
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from plot import bars

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
Result = dict[str, Any]


def markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table; every column but the first is aligned right."""
    lines = ["| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(_cell(v) for v in row) + " |" for row in rows)])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def operators(result: Result) -> str:
    """Times, speedup over the best other contender, and both errors against float64."""
    rows = []
    for row in result["rows"]:
        if "skipped" in row:
            continue
        entry = {name: row["contenders"].get(name, {}) for name in ("eager", "inductor", "max_autotune", "ours")}
        swapped = bool(entry["ours"].get("swapped"))
        rows.append([
            f"{row['problem']} ({row['tier']})", *(e.get("ms") for e in entry.values()), row["floor_ms"],
            _times(row["speedup"]) if swapped else "no swap", entry["eager"].get("error"), entry["ours"].get("error"),
        ])  # fmt: skip
    columns = [
        "problem",
        "eager ms",
        "Inductor ms",
        "max-autotune ms",
        "ours ms",
        "floor ms",
        "speedup",
        "eager's error",
        "our error",
    ]
    return markdown(columns, rows)


def rows(result: Result) -> str:
    """Share of the floor that a row norm reaches at each width, and its speedup where it was swapped."""
    cells: dict[str, dict[int, str]] = {}
    for row in result["rows"]:
        if "skipped" in row or not row.get("speedup"):
            continue
        norm, _, rest = row["problem"].partition("_rows_")
        width, _, dtype = rest.partition("_")
        ours = row["contenders"]["ours"]
        gain = _times(row["speedup"]) if ours.get("swapped") else "no swap"
        cells.setdefault(f"{norm} {dtype}", {})[int(width)] = f"{row['floor_ms'] / ours['ms']:.0%} ({gain})"
    widths = sorted({width for found in cells.values() for width in found})
    return markdown(["columns", *map(str, widths)], [[name, *(found.get(w) for w in widths)] for name, found in cells.items()])


def models(result: Result) -> str:
    """Latencies of both compilers in every mode that was measured, and what switching gains."""
    rows, modes = [], ("", " reduce-overhead", " max-autotune")
    for row in result["rows"]:
        if "skipped" in row:
            continue
        entry = row["modes"]
        names = ("eager", *(f"{who}{mode}" for mode in modes for who in ("inductor", "ours")))
        latencies = [entry.get(name, {}).get("abs_latency") for name in names]
        gains = [_gain(row["gain"].get(f"ours{mode}"), entry.get(f"ours{mode}", {}).get("swapped")) for mode in modes]
        seconds = [entry.get(m, {}).get("compilation_latency") for m in ("inductor", "ours")]
        wrong = [m for m in entry if entry[m].get("accurate") is False]
        verdict = "fail: " + ", ".join(wrong) if wrong else "pass"
        name = f"{row['model']} b{row['batch']} {row['precision']} {row['phase']}"
        peaks = [entry.get(m, {}).get("peak_memory") for m in ("inductor", "ours")]
        memory = [peak and round(peak / 2**20) for peak in peaks]
        rows.append([name, *latencies, *gains, row["swaps"], *seconds, row["verify_s"].get("ours"), *memory, verdict])
    columns = [
        "model", "eager ms", *(f"{who}{mode} ms" for mode in modes for who in ("Inductor", "ours")),
        "gain", "gain, reduce-overhead", "gain, max-autotune",
        "swaps", "Inductor compile s", "our compile s", "of it verifying", "Inductor peak MiB", "our peak MiB", "accuracy",
    ]  # fmt: skip
    shown = [i for i, _ in enumerate(columns) if any(row[i] is not None for row in rows)]  # not every run has every mode
    table = markdown([columns[i] for i in shown], [[row[i] for i in shown] for row in rows])
    return table + "".join(f"\n\n{line}" for line in means(result))


def means(result: Result) -> list[str]:
    """One sentence per mode of ours: the geometric mean over the rows with a swap, and the worst row of all."""
    names = {"ours": "default mode"} | {m: m.removeprefix("ours ") for m in result["summary"] if m != "ours"}
    return [
        f"{names[mode]}: geometric mean of Inductor's time over ours {found['geomean']:.3f}x over {found['models']} rows with "
        f"swaps; the worst row of all {found['worst']:.3f}x ({found['worst_model']})."
        for mode, found in result.get("summary", {}).items()
        if found["geomean"]
    ]


def _gain(gain: Result | None, swapped: Sequence[str] | None) -> str | None:
    """What a mode gains; None if it was not measured."""
    return gain and (f"{gain['ratio']:.3f}x ± {gain['noise']:.3f}" if swapped else "no swap")


def kernelbench(result: Result) -> str:
    """fast_p and the geometric means, then every problem that was measured, folded."""
    found = result["summary"]
    problems = [
        [f"{row['problem']} (batch x {row['batch_scale']:g})" if "batch_scale" in row else row["problem"],
         *(row["contenders"].get(name, {}).get("ms") for name in ("eager", "inductor", "ours")),
         _times(row.get("vs_eager")), _times(row.get("vs_inductor")) if row.get("swaps") else "no swap", row["verdict"]]
        for row in result["rows"] if "verdict" in row
    ]  # fmt: skip
    listed = markdown(["problem", "eager ms", "Inductor ms", "ours ms", "over eager", "over Inductor", "verdict"], problems)
    rows = [
        [name, found[key]["geomean"], found[key]["geomean_swapped"], *found[key]["fast_p"].values()]
        for name, key in (("eager", "vs_eager"), ("Inductor", "vs_inductor"))
    ]
    head = f"{found['correct']} of {found['problems']} problems correct, {found['swapped']} with a swap.\n\n"
    columns = ["against", "geomean", "geomean of the swapped", *(f"fast_{p}" for p in found["vs_eager"]["fast_p"])]
    return f"{head}{markdown(columns, rows)}\n\n<details><summary>Every problem</summary>\n\n{listed}\n\n</details>"


def _times(ratio: float | None) -> str | None:
    return None if ratio is None else f"{ratio:.2f}x"


def kernels(records: Sequence[Result]) -> str:
    """The shipped kernels of one device: each at the task it was accepted for, beside the baselines of the same evaluation."""
    rows = []
    for record in sorted(records, key=lambda r: (r["task"]["signature"], r["task"]["inputs"][0]["shape"])):
        found, task = record["evaluation"], record["task"]
        times, best = found["baselines_ms"], min(found["baselines_ms"].values())
        worst = max((e for e in found["errors"] if e["distribution"] == "normal"), key=lambda e: e["frobenius"])
        shape = " · ".join("x".join(map(str, t["shape"])) for t in task["inputs"][:2])
        rows.append([
            f"{task['signature']} {task['inputs'][0]['dtype']} {shape}",
            found["time_ms"], times.get("eager"), times.get("inductor"),
            f"{best / found['time_ms']:.2f}x",
            # a kernel faster than its floor says that the ceilings were measured while the machine was slow
            f"{found['floor_ms'] / found['time_ms']:.0%}" if found["floor_ms"] < found["time_ms"] else None, worst["frobenius"],
            worst["frobenius_yardstick"], f"`{record['kernel_name']}`",
        ])  # fmt: skip
    columns = ["task", "kernel ms", "eager ms", "Inductor ms", "of the best", "of the floor", "error", "eager's error", "kernel"]
    return markdown(columns, rows)


def gpus_first(folder: Path) -> tuple[bool, str]:
    """Sorts device kinds: CPUs last."""
    return folder.name.startswith("cpu"), folder.name


def kernel_sections(library: Path) -> str:
    """`kernels` for every device that the library has records for."""
    sections = []
    for folder in sorted((p for p in (library / "records").glob("*") if p.is_dir()), key=gpus_first):
        records = [json.loads(path.read_text()) for path in sorted(folder.glob("*/*.json"))]
        where = records[0]["evaluation"]["environment"]
        sections.append(f"**{where['device']}, torch {where['torch']}**\n\n{kernels(records)}")
    return "\n\n".join(sections) or "Not measured yet."


def overhead(result: Result) -> str:
    """What one call costs the host, and one compilation the processor."""
    lines = [
        [row["what"], f"{row['median']:.3g} {row['unit']}", f"{min(row['samples']):.3g} to {max(row['samples']):.3g}",
         _times(row.get("ratio"))]
        for row in result["rows"]
    ]  # fmt: skip
    return markdown(["what", "median", "samples", "of Inductor's"], lines)


TABLES: dict[str, Callable[[Result], str]] = {
    "operators": operators, "rows": rows, "models": models, "kernelbench": kernelbench, "overhead": overhead,
}  # fmt: skip


HEADS = {
    "operators": "### Operators through `torch.compile`\nTimes of one call, taken in turns. `speedup`: the best of eager, "
    "Inductor and max-autotune over ours. Errors are against float64.",
    "rows": "### Norms of rows\nOf 64 M elements through `torch.compile`: the share of the floor (reading and writing each "
    "element once at the device's copy bandwidth) that the compiled call reaches and, where a kernel was swapped in, the speedup "
    "over the best of eager and Inductor.",
    "models": "### Models end to end\nMilliseconds of one call or training step, taken in turns; `gain`: Inductor's time over "
    "ours in the same mode (median of paired ratios ± two standard errors). Compilation is cold. "
    "Language models get token ids alone, as in most benchmarks; BERT's attention then comes apart into products and a softmax "
    "when it is compiled on a GPU (transformers 5.17), which eager's does not.",
    "kernelbench": "### KernelBench problems\nProblem files of level 1 of "
    "[KernelBench](https://github.com/ScalingIntelligence/KernelBench) as they are, float32 without TF32; those that did not fit "
    "the device's memory beside their float64 reference ran at the part of their batch that stands behind their name. "
    "fast_p is the share of the problems that is correct and more than p times as fast. Where nothing was swapped the code is "
    "Inductor's own and the ratio is noise around 1: read fast_1 accordingly, and the means of the swapped problems for what "
    "the kernels gain.",
    "overhead": "### What it costs\nThe host's time for one call, beside eager's (the region adds 256 numbers, so launching it "
    "is all there is; the linear is float32, 128 rows, 768 wide, with the allocations that generated code makes), and the "
    "processor seconds of a cold and of a cached compilation, beside Inductor's.",
}
"""What stands above a table, once there are results for it."""


def section(result: Result, name: str) -> str:
    """One device's table under a line that says where and how it was measured."""
    versions = result["versions"]
    commits = list(dict.fromkeys(row.get("commit", result["commit"]) for row in result["rows"]))  # a resumed file has several
    named = f"commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}"
    where = f"{result['device']}, torch {versions.get('torch', '?')}, {named}, {result['date']}"
    if result.get("flags", {}).get("precompile"):
        where += ", each model precompiled"
    image = f"\n\n![{name}](benchmarks/results/{result['device_kind']}/{result['file']}.svg)" if speedups(result, name) else ""
    return f"**{where}**\n\n{TABLES[name](result)}{image}"


def speedups(result: Result, name: str) -> list[tuple[str, float]]:
    """(label, speedup) of every row with a swap: what the plot shows."""
    if name in ("operators", "rows"):
        rows = [r for r in result["rows"] if r.get("speedup") and r["contenders"].get("ours", {}).get("swapped")]
        return [(f"{r['problem']} ({r['tier']})", r["speedup"]) for r in rows]
    if name == "models":
        rows = [r for r in result["rows"] if r.get("swaps") and "ours" in r.get("gain", {})]
        return [(f"{r['model']} b{r['batch']} {r['precision']} {r['phase']}", r["gain"]["ours"]["ratio"]) for r in rows]
    return [(r["problem"], r["vs_inductor"]) for r in result["rows"] if r.get("swaps") and "vs_inductor" in r]


def load(results: Path, name: str) -> list[Result]:
    """The result files of one benchmark, by device kind: `models.json` and further runs such as `models-bert.json`."""
    paths = [*results.glob(f"*/{name}.json"), *results.glob(f"*/{name}-*.json")]
    paths.sort(key=lambda path: (gpus_first(path.parent), len(path.name)))
    return [{**json.loads(path.read_text()), "file": path.stem} for path in paths]


def rendered(readme: str, results: Path) -> str:
    """The README with every table generated anew, the library's from its records.

    Raises:
        SystemExit: if there are results for a table that the README has no place for.
    """
    place = re.compile(r"(<!-- begin:kernels -->\n).*?(<!-- end:kernels -->)", re.DOTALL)
    readme = place.sub(lambda match: f"{match[1]}{kernel_sections(ROOT / 'cache')}\n{match[2]}", readme)
    for name in TABLES:
        found = load(results, name)
        place = re.compile(rf"(<!-- begin:{name} -->\n).*?(<!-- end:{name} -->)", re.DOTALL)
        if not place.search(readme):
            if found:
                raise SystemExit(
                    f"README.md has no <!-- begin:{name} --> and <!-- end:{name} -->, but {name}.json is there; add them"
                )
            continue
        text = "\n\n".join([HEADS[name], *(section(result, name) for result in found)]) + "\n" if found else ""
        readme = place.sub(lambda match, text=text: f"{match[1]}{text}{match[2]}", readme)
    return readme


def plot(result: Result, name: str) -> str:
    """The plot of a result file as SVG; empty if nothing was swapped."""
    rows = speedups(result, name)
    versus = "the best of eager, Inductor and max-autotune" if name in ("operators", "rows") else "Inductor"
    return bars(f"{name} on {result['device']}: time of {versus} over ours", rows) if rows else ""


def plots(results: Path) -> dict[Path, str]:
    """The plot of every result file that has a swap."""
    found = [(result, plot(result, name)) for name in TABLES for result in load(results, name)]
    return {results / result["device_kind"] / f"{result['file']}.svg": text for result, text in found if text}


def main(argv: Sequence[str] | None = None) -> int:
    """Write, or with `--check` compare; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if README or plots differ from the results")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    wanted = {args.readme: rendered(args.readme.read_text(), args.results), **plots(args.results)}
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    for path in stale:
        print(f"{path} {'is out of date: run python benchmarks/readme_tables.py' if args.check else 'written'}")
        if not args.check:
            path.write_text(wanted[path])
    return int(args.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
