"""What one CUDA device says, in under ten minutes: the tests that need one, and short forms of the benchmarks.

    make gpu
    make gpu ARGS="--dry"                           a tiny model on the CPU, to see that all of it runs

In bfloat16, on random models of real shapes. Results have the device's name in their first line.
"""

import argparse
import subprocess
import sys
import time

import torch

# Module and arguments of each; `--dry` puts in what is shorter.
DECODE = ["benchmarks.decode", "--batch", "1", "--rounds", "3", "--window-length", "1024"]
FOUR = ["--contestants", "ours", "ours, compiled", "dynamic", "static, compiled"]
RUNS = [
    ["pytest", "--quiet", "tests/test_compiled.py", "-k", "cuda"],
    [*DECODE, "--model", "qwen3-0.6b", *FOUR],
    [*DECODE, "--model", "llama-3.2-1b", *FOUR],
    [*DECODE, "--model", "llama-8b", *FOUR],
    ["benchmarks.update", "--rounds", "3"],
    ["benchmarks.prefill", "--model", "qwen3-0.6b", "--windows", "4", "--rounds", "3"],
    ["benchmarks.turns", "--model", "qwen3-0.6b", "--turns", "8", "--anew", "1", "4", "8", "--rounds", "1"],
    ["benchmarks.flat", "--tokens", "20000"],
    ["benchmarks.peers", "--model", "qwen3-0.6b", "--lengths", "1024", "4096", "--rounds", "1", "--tokens", "16"],
]
SHORTER = {
    "qwen3-0.6b": "tiny",
    "llama-3.2-1b": "tiny",
    "llama-8b": "tiny",
    "1024": "64",
    "4096": "128",
    "20000": "400",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="on the CPU, with a tiny model")
    dry = parser.parse_args().dry
    if not dry and not torch.cuda.is_available():
        sys.exit("There is no CUDA device. `--dry` runs all of it on the CPU, with a tiny model.")
    failed = []
    for run in RUNS:
        if dry:
            run = [SHORTER.get(argument, argument) for argument in run]
            run += ["--device", "cpu"] if run[0] not in ("pytest", "benchmarks.peers") else []
            run += ["--window-length", "64"] if run[0] in ("benchmarks.update", "benchmarks.prefill") else []
        print(f"\n$ python -m {' '.join(run)}", flush=True)
        start = time.monotonic()
        code = subprocess.run([sys.executable, "-m", *run]).returncode
        print(f"{time.monotonic() - start:.0f} s", flush=True)
        failed += [run[0]] if code else []
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
