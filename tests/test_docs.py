"""What the documentation shows as code and its output is what the code prints."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from cafe.config import Config
from cafe.data.prepare import prepare
from cafe.data.simulate import Shop, draw
from cafe.train import fit

DOCS = Path(__file__).parent.parent / "docs"


def test_the_worked_example_of_the_protocol():
    page = (DOCS / "protocol.md").read_text()
    code, output = re.search(r"```python\n(.*?)```\n\n    (.*?)\n", page, re.S).groups()
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed == output + "\n"


def test_serving(tmp_path):
    user, item, intent = draw(Shop(interactions=2000, items=200, intents=10, users=250), seed=0)
    buys = [f"u{u},i{i},{time}" for time, (u, i) in enumerate(zip(user, item, strict=True))]
    (tmp_path / "buys.csv").write_text("\n".join(["user,item,timestamp", *buys]))
    (tmp_path / "items.csv").write_text("\n".join(["item,intent", *(f"i{i},c{c}" for i, c in enumerate(intent))]))
    prepare(tmp_path / "buys.csv", tmp_path / "items.csv", tmp_path / "data")
    dataset = prepare(tmp_path / "buys.csv", tmp_path / "items.csv")
    fit(Config.make("cafe", "best", epochs=2, dim=16), dataset, tmp_path / "runs/cafe", data=tmp_path / "data")

    def run(*arguments):
        environment = os.environ | {"PYTHONPATH": str(DOCS.parent)}
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    page = (DOCS / "serving.md").read_text()
    _, export, serve, *_ = re.findall(r"^    (\S.*?)(?: +#.*)?$", page, re.MULTILINE)
    assert export.startswith("cafe export ")
    run("-m", "cafe.cli", *shlex.split(export)[1:])
    assert serve.startswith("python serving/")
    printed = [line.split("\t")[0] for line in run(*shlex.split(serve)[1:])]
    served, searched, columns = run("-c", "".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)))
    assert served == searched == str(printed[:5])
    assert len(printed) == 10
    assert columns == "['user_id', 'item_id', 'score', 'rank']"


def test_links_between_pages_lead_somewhere():
    for page in [*DOCS.glob("*.md"), DOCS.parent / "README.md", *DOCS.parent.glob("benchmarks/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
