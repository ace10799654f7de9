"""Extra peak memory of a 2048-token prefill, one fresh process for each side.

The peak is the kernel's VmHWM, reset after the weights are loaded, packed and touched by a short
prompt; what is reported is the peak less what was resident then. For llama.cpp the resident figure
is taken before its context (compute buffers, states) exists, as those are what it allocates to run.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from bench.peers.common import PeerUnavailable, arguments, show_memory, write_case
from bench.peers.gguf_mamba import write_gguf
from bench.peers.hf_models import BUILDERS, prompt
from bench.peers.llama import LlamaModel
from bench.peers.models import prefill

TOKENS = 2048
WARM_TOKENS = 16


def _status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    line = next(
        s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(field)
    )
    return int(line.split()[1]) * 1024


def extra_peak(run: Callable[[], object]) -> dict[str, float]:
    """MiB resident before `run`, and how far the peak rose above that during it."""
    resident = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    run()
    return {"resident": resident / 2**20, "extra": (_status("VmHWM") - resident) / 2**20}


def probe(side: str, model_name: str, threads: int, folder: Path) -> dict[str, float]:
    torch.set_num_threads(threads)
    if side == "llama.cpp":
        path = folder / "model.gguf"
        llama = LlamaModel(path, threads, mmap=False)
        ids = prompt(TOKENS)[0].tolist()
        return extra_peak(lambda: llama.open().prefill(ids))
    model = BUILDERS[model_name]()
    if side == "effinfer":
        import effinfer

        assert effinfer.patch(model).replaced
    with torch.inference_mode():
        prefill(model, prompt(WARM_TOKENS))
        return extra_peak(lambda: prefill(model, prompt(TOKENS)))


def layer_activations(model_name: str) -> float:
    """MiB of one layer's activations: its residual in and out, projections, conv and scan."""
    config = BUILDERS[model_name]().config
    inner = 2 * config.hidden_size
    if model_name.startswith("mamba2"):
        conv = inner + 2 * config.n_groups * config.state_size
        widths = [inner + conv + config.num_heads, conv, inner]
    else:
        dt_b_c = int(config.time_step_rank) + 2 * config.state_size
        widths = [2 * inner, inner, dt_b_c, inner, inner]
    return TOKENS * 4 * (2 * config.hidden_size + sum(widths)) / 2**20


def main() -> None:
    args = arguments(
        __doc__,
        model={"choices": sorted(BUILDERS), "default": "mamba-130m"},
        probe={"help": "measure this side in this process and print JSON"},
        folder={"type": Path, "help": "where the GGUF file is, with --probe"},
    )
    if args.probe:
        print(json.dumps(probe(args.probe, args.model, args.threads, args.folder)))
        return
    found: dict[str, dict[str, float]] = {}
    absent: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            write_gguf(BUILDERS[args.model](), Path(folder) / "model.gguf")
        except PeerUnavailable as reason:
            absent["llama.cpp"] = str(reason)
        for side in ("effinfer", "transformers", "llama.cpp"):
            if side in absent or (args.sides and side not in args.sides):
                continue
            options = ["--probe", side, "--folder", folder, "--model", args.model]
            command = [sys.executable, "-m", "bench.peers.memory", *options]
            command += ["--threads", str(args.threads)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[side] = json.loads(done.stdout.splitlines()[-1])
    case = f"{args.model} prefill {TOKENS}, threads={args.threads}"
    entry = {
        "mib": {
            side: {k: round(v, 1) for k, v in values.items()} for side, values in found.items()
        },
        "layer_activations_mib": round(layer_activations(args.model), 1),
        "threads": args.threads,
        "absent": absent,
    }
    show_memory(case, entry)
    if not args.quick:
        write_case("memory", case, entry)


if __name__ == "__main__":
    main()
