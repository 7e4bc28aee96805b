"""What the documentation shows as code and its output is what the code prints."""

import re
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def test_the_worked_example_of_the_protocol():
    page = (DOCS / "protocol.md").read_text()
    code, output = re.search(r"```python\n(.*?)```\n\n    (.*?)\n", page, re.S).groups()
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed == output + "\n"


def test_links_between_pages_lead_somewhere():
    for page in [*DOCS.glob("*.md"), DOCS.parent / "README.md", *DOCS.parent.glob("benchmarks/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
