"""What it costs to begin: `import usae_probe` and `usae-probe --help`, beside a Python that does nothing.

Prints JSON: seconds of whole processes, in turns (median, least, greatest), what they cost over bare Python, and
the limits they are held against.

    python tests/benchmarks/startup.py [--rounds 15]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from statistics import median

COMMANDS = {
    "python": ["-c", "pass"],
    "import usae_probe": ["-c", "import usae_probe"],
    "usae-probe --help": ["-m", "usae_probe", "--help"],
    "usae-probe --version": ["-m", "usae_probe", "--version"],
}
LIMITS = {"import usae_probe": 0.3, "usae-probe --help": 0.5}


def seconds(arguments: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    for arguments in COMMANDS.values():
        seconds(arguments)  # files into memory, bytecode onto the disk
    taken = [{name: seconds(arguments) for name, arguments in COMMANDS.items()} for _ in range(rounds)]
    found = {}
    for name in COMMANDS:
        each = [one[name] for one in taken]
        found[name] = {"median": median(each), "least": min(each), "greatest": max(each)}
        found[name]["over python"] = median(one[name] - one["python"] for one in taken)
        if name in LIMITS:
            found[name] |= {"limit": LIMITS[name], "within": median(each) < LIMITS[name]}
    print(json.dumps({"rounds": rounds, "seconds": found}, indent=2))


if __name__ == "__main__":
    main()
