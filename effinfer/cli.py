"""The ``effinfer`` command: info, inspect, generate, serve, quantize, demo, bench."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

app = typer.Typer(
    help="Efficient-architecture PyTorch models, fast on the machine you have.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Prompt = Annotated[str | None, typer.Option(help="Text to continue.")]
PromptFile = Annotated[Path | None, typer.Option("--file", help="File whose text to continue.")]
Tokens = Annotated[int, typer.Option(min=1, help="Tokens to generate.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads (default: torch's choice).")]
ModelDir = Annotated[
    Path, typer.Argument(help="A Hugging Face model folder, or a .gguf file, on this machine.")
]


BitsOption = Annotated[
    str, typer.Option(help="8, 4, 3, 2, 1.58, 1, or a format: int8, ..., ternary_dense, binary.")
]


def _fail(message: str) -> NoReturn:
    # One line, however narrow the terminal is taken to be: scripts look for words in it.
    Console(stderr=True).print(f"[red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    raise typer.Exit(1)


def _prompt_text(prompt: str | None, file: Path | None, default: str | None = None) -> str:
    if prompt is not None and file is not None:
        _fail("give --prompt or --file, not both")
    if file is not None:
        try:
            prompt = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            _fail(f"--file {file}: {error}")
    if prompt is None:
        prompt = default
    if not prompt:
        _fail("the prompt is empty; give --prompt TEXT or --file PATH")
    return prompt


def _load(model_dir: Path) -> tuple[Any, Any]:
    """Model and tokenizer from a local folder or GGUF file: no pickle, no code from it is run."""
    from effinfer.loading import is_model, load_model

    if not is_model(model_dir):
        _fail(f"{model_dir} is not a model folder: it has no config.json, and is no .gguf file")
    try:
        return load_model(model_dir)
    except Exception as error:  # whatever a hostile or truncated file makes the loaders raise
        _fail(f"cannot load {model_dir}: {type(error).__name__}: {error}")


@app.command()
def info() -> None:
    """Show this machine's instruction set, threads, backends, versions and each op's kernel."""
    import transformers

    import effinfer

    found = effinfer.backend_info()
    kernels = found.pop("kernels")
    table = Table("", "", title="effinfer", show_header=False)
    for key, value in {
        **found,
        "transformers": transformers.__version__,
        "python": sys.version.split()[0],
    }.items():
        table.add_row(key, str(value))
    ops = Table("op", "kernel", title="ops")
    for name, isa in sorted(kernels.items()):
        ops.add_row(name, isa)
    console = Console()
    console.print(table)
    console.print(ops)


@app.command()
def inspect(model_dir: ModelDir) -> None:
    """Show what would be patched in a model, and why not the rest. Reads no weights."""
    import effinfer
    from effinfer.loading import empty_model

    try:
        model = empty_model(model_dir)
    except Exception as error:
        _fail(f"cannot read {model_dir}: {type(error).__name__}: {error}")
    print(effinfer.patch(model, dry_run=True))


@app.command()
def generate(
    model_dir: ModelDir,
    prompt: Prompt = None,
    file: PromptFile = None,
    tokens: Tokens = 128,
    sample: Annotated[bool, typer.Option(help="Sample rather than take the likeliest.")] = False,
    temperature: Annotated[float, typer.Option(min=1e-3)] = 1.0,
    seed: int = 0,
    threads: Threads = None,
    stock: Annotated[bool, typer.Option(help="Leave the model unpatched.")] = False,
) -> None:
    """Continue a text with a model folder, patched, streaming the words as they come."""
    import torch
    from transformers import TextStreamer

    import effinfer

    text = _prompt_text(prompt, file)
    if threads is not None:
        torch.set_num_threads(threads)
    model, tokenizer = _load(model_dir)
    if not stock:
        effinfer.patch(model)
    inputs = tokenizer(text, return_tensors="pt")
    torch.manual_seed(seed)
    options: dict[str, Any] = {"temperature": temperature} if sample else {}
    with torch.inference_mode():
        model.generate(
            **inputs,
            max_new_tokens=tokens,
            do_sample=sample,
            streamer=TextStreamer(tokenizer),
            **options,
        )


@app.command()
def demo(
    prompt: Prompt = None,
    file: PromptFile = None,
    tokens: Tokens = 128,
    threads: Threads = None,
    bits: Annotated[
        str | None, typer.Option(help="Quantize our side: 8, 4, 3, 2, 1.58, 1.")
    ] = None,
    recursive: Annotated[
        bool, typer.Option("--recursive", help="Depth-wise batching beside plain.")
    ] = False,
    loops: Annotated[
        int | None, typer.Option(help="Loops of the recursive model: 4 (default) or 2.")
    ] = None,
    slots: Annotated[
        int | None, typer.Option(min=1, help="With --recursive: requests at once (default 4).")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="With --recursive: a PNG to draw the depths in.")
    ] = None,
) -> None:
    """Run the carried Mamba model as transformers ships it and patched, and compare the two.

    Fails where tokens differ; with --bits they may, and how far they agree is shown. With
    --recursive, the carried recursive model: depth-wise batching beside plain continuous batching,
    with a picture of which request sat at which depth at each launch.
    """
    from transformers.utils import logging

    from effinfer.demo import DEFAULT_PROMPT, run_demo

    parsed = None if bits is None else _parse_bits(bits)
    text = _prompt_text(prompt, file, DEFAULT_PROMPT)

    logging.set_verbosity_error()  # the stock side warns about each fast path it lacks
    logging.disable_progress_bar()
    if recursive:
        if bits is not None:
            _fail("--recursive takes no --bits")
        _recursive_demo(text, tokens, loops or 4, slots or 4, threads, picture)
        return
    if any(option is not None for option in (loops, slots, picture)):
        _fail("--loops, --slots and --picture need --recursive")
    same = run_demo(text, tokens, threads, parsed)
    if not same and bits is None:
        raise typer.Exit(1)


def _recursive_demo(
    text: str, tokens: int, loops: int, slots: int, threads: int | None, picture: Path | None
) -> None:
    from effinfer.demo_recursive import run_recursive_demo
    from effinfer.errors import EffinferError

    try:
        same = run_recursive_demo(text, tokens, loops, slots, threads, picture)
    except (ValueError, EffinferError) as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"--picture {picture}: {error}")
    if not same:
        raise typer.Exit(1)


def _parse_bits(bits: str) -> float | str:
    """A number of bits or a format's name."""
    from effinfer.quant.config import format_of

    try:
        value: float | str = float(bits)
    except ValueError:
        value = bits
    try:
        format_of(value)
    except ValueError as error:
        _fail(f"--bits: {error}")
    return int(value) if isinstance(value, float) and value == int(value) else value


@app.command()
def quantize(
    model_dir: ModelDir,
    out: Annotated[Path, typer.Argument(help="A folder to make.")],
    bits: BitsOption = "4",
    group_size: Annotated[int, typer.Option(help="Columns per scale; -1 for whole rows.")] = 128,
    method: Annotated[str, typer.Option(help="rtn, gptq, quantease or gptq+cd.")] = "rtn",
    calibration: Annotated[Path | None, typer.Option(help="A text file to calibrate on.")] = None,
    activations: Annotated[str, typer.Option(help="int8 or f32.")] = "int8",
    threads: Threads = None,
) -> None:
    """Quantize a model folder into another, which loads like it, and report each layer's error."""
    import torch

    import effinfer

    if out.exists():
        _fail(f"{out} exists already; give a folder to make")
    try:
        config = effinfer.QuantConfig(
            bits=_parse_bits(bits), group_size=group_size, method=method, activations=activations
        )
    except ValueError as error:
        _fail(str(error))
    text = None if calibration is None else _prompt_text(None, calibration)
    if config.needs_calibration and text is None:
        _fail(f"--method {method} needs --calibration FILE")
    if threads is not None:
        torch.set_num_threads(threads)
    model, tokenizer = _load(model_dir)
    try:
        report = effinfer.quantize_(model, config, text, tokenizer=tokenizer)
    except (ValueError, TypeError, effinfer.EffinferError) as error:
        _fail(str(error))
    print(report)
    # Beside its final place and moved there whole: no half-written folder is ever called OUT.
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as beside:
            made = Path(beside) / out.name
            model.save_pretrained(made)
            tokenizer.save_pretrained(made)
            made.rename(out)
    except OSError as error:
        _fail(f"cannot write {out}: {error}")


@app.command()
def serve(
    model: Annotated[
        str,
        typer.Argument(
            help="A model folder, a .gguf file, or a carried model: demo, demo-recursive, "
            "demo-recursive-r2."
        ),
    ],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    name: Annotated[str | None, typer.Option(help="Name that requests give the model.")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="EFFINFER_API_KEY", help="Key that requests must carry.")
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="Origin that browsers may call from; repeatable.")
    ] = None,
    mode: Annotated[str, typer.Option(help="full, exit or lossless.")] = "full",
    max_slots: Annotated[int, typer.Option(min=1, help="Requests that run at once.")] = 32,
    max_queue: Annotated[int, typer.Option(min=0, help="Requests that may wait.")] = 256,
    max_queued_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of unfinished requests together.")
    ] = 1 << 20,
    memory_gb: Annotated[
        float | None, typer.Option(min=0.0, help="For keys, values and states.")
    ] = None,
    deadline: Annotated[float, typer.Option(min=0.0, help="Seconds a request may take.")] = 600.0,
    drain: Annotated[float, typer.Option(min=0.0, help="Seconds to end on SIGTERM.")] = 30.0,
    threads: Threads = None,
    ray: Annotated[bool, typer.Option("--ray", help="Serve replicas, by Ray Serve.")] = False,
    replicas: Annotated[int, typer.Option(min=1, help="With --ray: how many, at least.")] = 1,
    max_replicas: Annotated[
        int | None, typer.Option(min=1, help="With --ray: how many when requests queue.")
    ] = None,
) -> None:
    """Serve a model over HTTP as OpenAI's API does, with a live page at / and metrics at /metrics."""
    try:
        from effinfer.serve import ServedModel, ServeSettings
        from effinfer.serve import run as on_this_machine

        if ray:
            from effinfer.serve import ray as on_many
    except ModuleNotFoundError as error:
        extra = "ray" if error.name == "ray" else "serve"
        _fail(f"serving needs {error.name}: pip install 'effinfer[{extra}]'")
    from effinfer.loading import is_model

    if not ray and (replicas > 1 or max_replicas is not None):
        _fail("--replicas and --max-replicas need --ray")
    if max_replicas is not None and max_replicas < replicas:
        _fail(f"--max-replicas must be at least --replicas {replicas}, got {max_replicas}")
    path = _carried_model(model) or Path(model)
    if not is_model(path):
        _fail(f"{path} is not a model folder: it has no config.json, and is no .gguf file")
    served = ServedModel(
        path.resolve(),
        mode=mode,
        max_slots=max_slots,
        max_queue=max_queue,
        memory_bytes=None if memory_gb is None else int(memory_gb * 2**30),
        threads=threads,
    )
    settings = ServeSettings(
        model_name=name or (model if _carried_model(model) else path.resolve().name),
        api_key=api_key,
        cors_origins=tuple(cors_origin or ()),
        max_queued_tokens=max_queued_tokens,
        deadline_s=deadline,
        drain_s=drain,
    )
    if host not in ("127.0.0.1", "::1", "localhost") and api_key is None:
        Console(stderr=True).print(
            f"[yellow]warning:[/] {host} can be reached from other machines, and no --api-key is set"
        )
    if ray:
        deployed = on_many.application(
            lambda: served.app(settings),
            settings,
            max_slots=max_slots,
            max_queue=max_queue,
            replicas=replicas,
            max_replicas=max_replicas,
            cpus=threads or 1,
        )
        Console().print(f"{settings.model_name} at http://{host}:{port}", highlight=False)
        return on_many.run(deployed, host, port)
    try:
        application = served.app(settings)
        application.state.supervisor.prepare()
    except Exception as error:  # whatever a hostile or truncated file makes the loaders raise
        _fail(f"cannot serve {path}: {type(error).__name__}: {error}")
    return on_this_machine.run(application, settings, host, port)


def _carried_model(name: str) -> Path | None:
    """The folder of a model that the wheel carries; None when it has none of that name."""
    from effinfer.models import demo_path, recursive_demo_path

    carried: dict[str, Callable[[], Path]] = {
        "demo": demo_path,
        "demo-recursive": recursive_demo_path,
        "demo-recursive-r2": lambda: recursive_demo_path(2),
    }
    return carried[name]() if name in carried else None


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context) -> None:
    """Run effinfer-bench, the native benchmark; options are passed on (try --help after --)."""
    beside = Path(sysconfig.get_path("scripts")) / "effinfer-bench"
    program = str(beside) if beside.is_file() else shutil.which("effinfer-bench")
    if program is None:
        _fail("effinfer-bench is not installed beside this Python; reinstall effinfer")
    os.execv(program, [program, *context.args])


def main() -> None:
    """Entry point of the ``effinfer`` script."""
    app()


if __name__ == "__main__":
    main()
