"""Several systems over several seeds from one file, as the paper's Tables 2 and 3: trains what is not there yet, and ranks.

The file is TOML:

    baseline = "SASRec"            # whom the gains are over
    seeds = 3                      # optional
    protocols = ["aligned"]        # optional; of "aligned", "full" and "authors"

    [common]                       # optional: options of every system
    dim = 64

    [systems.SASRec]               # one such part a system, in the order of the tables
    model = "sasrec"               # and any field of the configuration (cafe.config); `preset` is "paper" unless given

`table2`, `table3` and `figure4` are files that come with the package. A system's seed is a run folder of its own, SYSTEM-SEED, which all
commands read; a folder that is there is gone on with, so the work can be cut and repeated, and grows with `seeds`. Beside them
experiment.json keeps the systems' names and the baseline for `cafe report`.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cafe.candidates import PAIRED_INTENTS
from cafe.config import Config
from cafe.data.dataset import Dataset
from cafe.data.folders import write_atomically
from cafe.evaluate import evaluate
from cafe.evaluation import Evaluation, Results
from cafe.runs import load_run
from cafe.train import fit

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BUILT_IN = Path(__file__).with_name("experiments")
NAMES = "experiment.json"
DEFAULTS: dict[str, Any] = {"baseline": None, "seeds": 3, "protocols": ["aligned", "full", "authors"], "common": {}}


@dataclass(frozen=True)
class Experiment:
    """What `read_experiment` found in a file."""

    systems: dict[str, Config]
    baseline: str
    seeds: int
    protocols: list[str]


def read_experiment(path: str | Path) -> Experiment:
    """The experiment of a file, or of a built-in name ("table2", "table3").

    Raises:
        FileNotFoundError: neither.
        ValueError: the file cannot be read, or asks for what does not exist; says what.

    Example:
        >>> list(read_experiment("table3").systems)[1]
        '+(1) FDSA'
    """
    file = BUILT_IN / f"{path}.toml" if re.fullmatch(r"\w+", str(path)) and not Path(path).exists() else Path(path)
    if not file.is_file():
        known = ", ".join(sorted(entry.stem for entry in BUILT_IN.glob("*.toml")))
        raise FileNotFoundError(f"{path}: no such file, nor one of the experiments that come with the package: {known}")
    try:
        content = tomllib.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: cannot be read as TOML ({error})") from None
    if unknown := content.keys() - DEFAULTS.keys() - {"systems"}:
        raise ValueError(f"{file}: unknown {', '.join(sorted(unknown))}; there are {', '.join([*DEFAULTS, 'systems'])}")
    content = DEFAULTS | content
    parts = content.get("systems")
    if not isinstance(parts, dict) or not parts or not all(isinstance(part, dict) for part in parts.values()):
        raise ValueError(f"{file}: no system in it; write a part [systems.NAME] with model = ... for each")
    if not isinstance(content["common"], dict):
        raise ValueError(f"{file}: common={content['common']!r}: expected a part [common] of options")
    systems = {}
    for name, part in parts.items():
        options = {"preset": "paper"} | content["common"] | part
        if "model" not in options or "seed" in options:
            raise ValueError(
                f"{file}: systems.{name}: expected a model and no seed; seeds = N above all parts is how many"
            )
        try:
            systems[name] = Config.make(**options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file}: systems.{name}: {error}") from None
    slugs = [slug(name) for name in systems]
    if len(set(slugs)) < len(slugs):
        raise ValueError(f"{file}: two systems would share a run folder ({', '.join(slugs)}): rename one")
    baseline = content["baseline"] or next(iter(systems))
    if not isinstance(baseline, str) or baseline not in systems:
        raise ValueError(f"{file}: baseline {baseline!r} is not one of the systems: {', '.join(systems)}")
    if type(content["seeds"]) is not int or content["seeds"] < 1:
        raise ValueError(f"{file}: seeds={content['seeds']!r}: expected a whole number from 1 on")
    try:
        return Experiment(systems, baseline, content["seeds"], checked_protocols(content["protocols"]))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def read_names(folder: Path) -> tuple[dict[str, str], str]:
    """What the experiment in a folder calls its systems, by the names of their run folders, and its baseline; ({}, "") if there is none.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        none = '{"systems": {}, "baseline": ""}'
        content = json.loads((folder / NAMES).read_text() if (folder / NAMES).is_file() else none)
        return {str(key): str(name) for key, name in content["systems"].items()}, str(content["baseline"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{folder / NAMES} is damaged: run `cafe compare --config` again, or delete it") from None


def checked_protocols(protocols: Any) -> list[str]:
    """The protocols, each once; a ValueError for what is not a list of their names."""
    known = DEFAULTS["protocols"]
    if not isinstance(protocols, list) or not protocols or any(name not in known for name in protocols):
        raise ValueError(f"protocols={protocols!r}: expected a list of some of {', '.join(known)}")
    return list(dict.fromkeys(protocols))


def possible_protocols(protocols: Sequence[str], dataset: Dataset) -> list[str]:
    """Without `authors` where there are not the three intents that its pairing needs."""
    return [name for name in protocols if name != "authors" or dataset.num_intents >= PAIRED_INTENTS]


def run_experiment(
    experiment: Experiment,
    data: str | Path,
    out: str | Path,
    *,
    device: str = "cpu",
    progress: Callable[[str, int], Callable[[dict[str, Any]], None]] = lambda name, seed: lambda event: None,
) -> Results:
    """Trains what is missing in the folder `out` and ranks it on the test answers.

    Args:
        data: a prepared dataset.
        progress: called with the name and seed of each training that begins, returns `fit`'s `progress`.

    Returns:
        For each protocol and system the evaluations of its seeds; without `authors` where there are fewer than three intents.

    Raises:
        ValueError: a run folder in `out` is of another configuration or dataset.
    """
    data, out = Path(data), Path(out)
    dataset = Dataset.load(data)
    out.mkdir(parents=True, exist_ok=True)
    former = read_names(out)[0]
    names = {"systems": former | {slug(name): name for name in experiment.systems}, "baseline": experiment.baseline}
    write_atomically({out / NAMES: [json.dumps(names, indent=2).encode()]})
    protocols = possible_protocols(experiment.protocols, dataset)
    results: Results = {protocol: {name: [] for name in experiment.systems} for protocol in protocols}
    for seed, name, config in _runs(experiment):
        run = out / f"{slug(name)}-{seed}"
        fit(
            config,
            dataset,
            run,
            data=data,
            resume=(run / "config.json").exists(),
            device=device,
            progress=progress(name, seed),
        )
        for protocol in protocols:
            results[protocol][name].append(ranked(run, name, dataset, protocol))
    return results


def _runs(experiment: Experiment) -> Iterator[tuple[int, str, Config]]:
    """All systems with a seed before the next seed, so that a cut leaves whole tables."""
    for seed in range(experiment.seeds):
        for name, config in experiment.systems.items():
            yield seed, name, Config(**vars(config) | {"seed": seed})


def ranked(run: Path, name: str, dataset: Dataset, protocol: str, split: str = "test") -> Evaluation:
    """A run's evaluation of everybody by the default candidates: read from the run folder, or computed and kept there."""
    file = run / Evaluation.file_name(split, protocol)
    if file.exists() and file.stat().st_mtime_ns >= (run / "best.safetensors").stat().st_mtime_ns:
        found = Evaluation.load(file)
        if (found.dataset, found.seed, found.popularity) in ((dataset.fingerprint, 0, kind) for kind in ("all", None)):
            return replace(found, model=name)
    result = evaluate(load_run(run, dataset)[0], dataset, split, protocol, batch_size=1024, name=name)
    result.keep(run)
    return result


def slug(name: str) -> str:
    """The name of a system as that of a folder."""
    return re.sub(r"[^\w+-]+", "-", name).strip("-").lower() or "system"
