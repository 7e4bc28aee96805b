"""Kills training with SIGKILL at random moments and checks that next to nothing is lost.

    python -m tests.faults --kills 20 --seed 0

`cafe train` runs on a small simulated shop and saves after every step (checkpoint_seconds=0). Each kill aims at a part of
it (start, step, saving, validating, finishing): it waits for a random one of these and then for a random share of the time
that one takes. After each kill the files that are there must be whole, the checkpoint must not have gone back, and it must
be at most one step behind what the progress said. Then the run is resumed, and killed again. Each run that gets to its end
must be that of a run without kills: the same bits of best and last, the same metrics, no other file; then the next begins.

A process is forked from this one, which has imported everything, so that most of its life is what is to be tested.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

import cafe.runs
import cafe.train
from cafe.checkpoint import load_checkpoint
from cafe.cli import main as cafe_main
from cafe.runs import read_run

PARTS = {
    "train_step": "step",
    "save_checkpoint": "saving",
    "write_atomically": "saving",
    "validate": "validating",
    "plot_curve": "finishing",
    "_calibrate": "finishing",
    "plot_theta": "finishing",
}
AIMS = ("start", "step", "saving", "validating", "finishing")
DECK = [*AIMS, *AIMS[:3], "saving", "saving"]
OPTIONS = "--dim 16 --max-len 10 --batch-size 512 --epochs 3 --set valid_users=200 --set negatives=32 --threads 1"


def start(arguments, log):
    """`cafe arguments` in a new process; returns its number and a pipe that tells what it is doing."""
    read, write = os.pipe()
    if process := os.fork():
        os.close(write)
        return process, os.fdopen(read)
    os.close(read)
    for standard in (1, 2):
        os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), standard)

    def told(function, part):
        def run(*values, **options):
            os.write(write, f"+{part}\n".encode())
            try:
                return function(*values, **options)
            finally:
                os.write(write, f"-{part}\n".encode())

        return run

    def fit(*values, progress, **options):
        def tell(event):
            os.write(write, f"={event['step']}\n".encode())
            progress(event)

        return true_fit(*values, progress=tell, checkpoint_seconds=0, **options)

    true_fit, cafe.train.fit = cafe.train.fit, fit
    for module in (cafe.train, cafe.runs):
        for name in PARTS.keys() & vars(module).keys():
            setattr(module, name, told(getattr(module, name), PARTS[name]))
    sys.argv = ["cafe", *map(str, arguments)]
    try:
        cafe_main()
    except SystemExit as end:
        sys.stdout.flush()
        os._exit(int(end.code or 0))
    finally:
        os._exit(9)


def finish(process, log):
    """Waits for a process; True where it was killed, and an error where it failed."""
    status = os.waitpid(process, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, log.read_text()
    return os.WIFSIGNALED(status)


def durations(events):
    """Seconds that each of AIMS takes, from the events of a whole run."""
    begun, taken, first = {}, {}, time.monotonic()
    for event in events:
        mark, part = event[0], event[1:].strip()
        if mark == "+":
            taken.setdefault("start", [time.monotonic() - first])
            begun[part] = time.monotonic()
        elif mark == "-":
            taken.setdefault(part, []).append(time.monotonic() - begun[part])
    return {part: (sum(times) / len(times), len(times)) for part, times in taken.items()}


def kill(process, events, aim, number, delay):
    """Kills the process `delay` seconds into the `number`th part `aim`; returns what it told, to the last."""
    seen = []
    if aim != "start":
        for event in events:
            seen.append(event.strip())
            if seen.count(f"+{aim}") == number:
                break
    time.sleep(delay)
    os.kill(process, signal.SIGKILL)
    return seen + [event.strip() for event in events]


def landed(seen):
    """The innermost part that was begun and not ended."""
    stack = ["between steps" if "+step" in seen else "start"]
    for event in seen:
        if event[0] == "+":
            stack.append(event[1:])
        elif event[0] == "-":
            stack.pop()
    return stack[-1]


def content(run):
    """All that must not depend on kills: names of files, tensors, states and metrics without times."""
    files = {name: load_checkpoint(run / f"{name}.safetensors") for name in ("best", "last")}
    tensors = {(name, key): tensor for name, (part, _) in files.items() for key, tensor in part.items()}
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in (*metrics, *files["last"][1]["metrics"]):
        del line["tokens_per_s"]
    return {entry.name for entry in run.iterdir()}, [state for _, state in files.values()], metrics, tensors


def equal(run, other):
    (*facts, tensors), (*other_facts, other_tensors) = content(run), content(other)
    return (
        facts == other_facts
        and tensors.keys() == other_tensors.keys()
        and all(torch.equal(tensor, other_tensors[key]) for key, tensor in tensors.items())
    )


def main(kills, seed, work):
    dice, log = random.Random(seed), work / "log"
    data = work / "data"
    table = {name: work / f"files/{name}.csv.gz" for name in ("interactions", "items")}
    train = ["train", *OPTIONS.split(), "--data", data, "--out"]
    for command in (
        ["simulate", "--out", work / "files"],
        ["prepare", "--interactions", table["interactions"], "--items", table["items"], "--out", data],
    ):
        finish(start(command, log)[0], log)
    process, events = start([*train, work / "whole"], log)
    times = durations(events)
    finish(process, log)
    print("seconds (how often):", ", ".join(f"{part} {times[part][0]:.4f} ({times[part][1]})" for part in AIMS))
    finished = done = step = 0
    deck, files, outcomes = [], set(), Counter()
    while done < kills or step:
        run = work / f"run{finished}"
        resume = ["--resume"] if (run / "config.json").exists() else []
        process, events = start([*train, run, *resume], log)
        seen = []
        if done < kills:
            deck = deck or dice.sample(DECK, len(DECK))
            aim = deck.pop()
            number = dice.randint(1, max(1, times.get(aim, (0, 1))[1] // 2))
            seen = kill(process, events, aim, number, dice.uniform(0, 1.2 * times[aim][0]))
        else:
            list(events)  # to the end
        if not finish(process, log):
            assert equal(run, work / "whole"), f"{run} is not {work / 'whole'}"
            finished, step, files = finished + 1, 0, set()
            print(f"run {finished}: finished, every bit as without kills", flush=True)
            continue
        done += 1
        present = {path.name for path in run.iterdir()} if run.exists() else set()
        assert files <= present, f"{files - present} is gone"
        files = {name for name in present if not name.endswith(".tmp")}
        half = present - files
        if "config.json" in files:
            read_run(run)
        saved = {name: load_checkpoint(run / name)[1]["step"] for name in files if name.endswith(".safetensors")}
        told = max([step, *(int(event[1:]) for event in seen if event[0] == "=")])
        last = saved.get("last.safetensors", 0)
        assert step <= last, f"the checkpoint went back from step {step} to {last}"
        assert told - 1 <= last <= told, f"step {told} was made, but the checkpoint is of step {last}"
        step, where = last, landed(seen)
        outcomes[where, told - last, bool(half)] += 1
        print(f"kill {done}: in {where}, step {told}, saved {last}, half-written {', '.join(half) or 'nothing'}")
    print(f"{kills} kills, {finished} runs finished, each bit for bit that without kills; no checkpoint lost")
    print(f"{'killed in':15} {'kills':>5} {'steps lost: 0':>14} {'1':>3} {'half-written file left':>24}")
    for part in (*AIMS[:2], "between steps", *AIMS[2:]):
        rows = {key: count for key, count in outcomes.items() if key[0] == part}
        lost = [sum(count for key, count in rows.items() if key[1] == steps) for steps in (0, 1)]
        left = sum(count for key, count in rows.items() if key[2])
        print(f"{part:15} {sum(lost):5} {lost[0]:14} {lost[1]:3} {left:24}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # no thread may run here when a process is forked
    with tempfile.TemporaryDirectory() as folder:
        main(options.kills, options.seed, Path(folder))
