"""`make demo`: a simulated shop, four models, one table, and one user's recommendations with their reasons.

The steps are the commands that a user would type; each is printed before it runs.
"""

import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

RUNS = {
    "poprec": "--model poprec --preset paper",
    "sasrec": "--model sasrec --preset paper --set dim=64 --epochs 60",
    "cafe-paper": "--model cafe --preset paper --set dim=64 --epochs 40",
    "cafe-best": "--model cafe --preset best --epochs 30",
}


def cafe(command: str) -> None:
    """Runs one `cafe` command, shown as it would be typed; stops the demo where it fails."""
    print(f"\n$ cafe {command}", flush=True)
    code = subprocess.run([sys.executable, "-m", "cafe.cli", *shlex.split(command)]).returncode
    if code:
        sys.exit(code)


def main() -> None:
    started, folder = time.monotonic(), Path("demo")
    if folder.exists():
        shutil.rmtree(folder)
    print("The data of this demo are SIMULATED: they show how things work, not how good they are on your data.")
    cafe("simulate --preset demo --out demo/files")
    cafe("prepare --interactions demo/files/interactions.csv.gz --items demo/files/items.csv.gz --out demo/data")
    for name, options in RUNS.items():
        cafe(f"train --data demo/data --out demo/{name} {options} --threads 1")  # the model is too small for more
    cafe(
        "compare "
        + " ".join(f"demo/{name}" for name in ("sasrec", "poprec", "cafe-paper", "cafe-best"))
        + " --plot demo/comparison.png"
    )
    from cafe.data.dataset import Dataset

    user = Dataset.load("demo/data").user_ids[0]
    cafe(f"recommend --run demo/cafe-best --user {shlex.quote(str(user))} -k 5")
    print(
        f"\nDone in {time.monotonic() - started:.0f} s. Simulated data; "
        "runs, metrics, curves and the comparison (demo/comparison.png) are in demo/."
    )


if __name__ == "__main__":
    main()
