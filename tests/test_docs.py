"""The documentation is true: its code runs and prints what it shows, its formulas hold, its links lead somewhere, its errors exist."""

import ast
import contextlib
import importlib
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import cafe_kernels
from cafe.config import Config
from cafe.data.prepare import prepare
from cafe.data.simulate import PRESETS, Shop, draw
from cafe.train import fit
from cafe_kernels import distance_attention

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```(\w+)( title=[^\n]*)?\n(.*?)^```", re.S | re.M)


def same(shown: str, printed: str, other_numbers: bool) -> bool:
    """`...` stands for anything; numbers may be others where the page says so."""
    pattern = re.escape(shown.strip()).replace(re.escape("..."), ".*")
    if other_numbers:
        pattern = re.sub(r"\d+(\\\.\d+)?", r"\\d+(\\.\\d+)?", pattern)
    return re.fullmatch(pattern, printed.strip(), re.S) is not None


@pytest.fixture
def one_thread(monkeypatch):
    """As other processes may run on this machine."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_the_quickstart(tmp_path, monkeypatch, one_thread):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    cafe, names = f'set -e; cafe() {{ "{sys.executable}" -m cafe.cli "$@"; }}\n', {}
    blocks = BLOCK.findall((DOCS / "quickstart.md").read_text())
    assert [kind for kind, *_ in blocks].count("text") >= 6
    for (kind, _, code), (after, title, shown) in zip(blocks, [*blocks[1:], ("", "", "")], strict=True):
        if kind == "text":
            continue
        printed = io.StringIO()
        if kind == "bash":
            done = subprocess.run(["bash", "-c", cafe + code], capture_output=True, text=True)
            assert done.returncode == 0, code + done.stderr
            printed.write(done.stdout)
        else:
            assert kind == "python", kind
            with contextlib.redirect_stdout(printed):
                exec(code, names)
        if after == "text":
            assert same(shown, printed.getvalue(), bool(title)), f"{code}\nprinted\n{printed.getvalue()}\nnot\n{shown}"


def test_what_is_the_same():
    assert same("a 1.5\n...\nb", "a 1.5\nx\nb\n", False)
    assert not same("a 1.5", "a 1.6", False)
    assert same("a 1.5 (2)", "a 12 (3.25)", True)
    assert not same("a 1.5", "b 1.5", True)


def test_the_worked_example_of_the_protocol():
    page = (DOCS / "protocol.md").read_text()
    code, output = re.search(r"```python\n(.*?)```\n\n    (.*?)\n", page, re.S).groups()
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed == output + "\n"


def test_the_formulas_of_the_kernel():
    """docs/kernel.md, in float64, for one head and two sequences: the online softmax, and its gradients down to the paper's parameters."""
    torch.manual_seed(0)
    n, width, scale, p, block = 9, 3, 0.4, 0.25, 4
    lengths, (distance, weight, bias) = (n, 5), (torch.randn(size, dtype=torch.float64) for size in ((2 * n, 3), 3, ()))
    r = distance[n:] @ weight
    for x in (distance, weight, bias):
        x.requires_grad_()
    expected, sum_dr, sum_dq = [], torch.zeros(n, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    for length in lengths:
        Q, K, V, g = (torch.randn(length, width, dtype=torch.float64).requires_grad_() for _ in range(4))
        i, j = torch.arange(length)[:, None], torch.arange(length)[None, :]
        M = (torch.rand(length, length) > p) / (1 - p)
        # Eq. 5-6 as printed, with all terms that cancel.
        log_theta = ((Q[:, None] + K[None] + distance[n + i - j]) * weight).sum(-1) + bias
        logits = (scale * Q @ K.T + log_theta).masked_fill(j > i, -torch.inf)
        out = (M * logits.softmax(-1)) @ V
        (out * g).sum().backward()
        expected.append((out.detach(), Q.grad, K.grad, V.grad))
        # The op: a shifted query, a number per distance.
        q, k, v, g = (x.detach() for x in (Q + weight / scale, K, V, g))
        x = (scale * q @ k.T + r[(i - j).clamp(0)]).masked_fill(j > i, -torch.inf)
        largest, total, values = x.new_full((length,), -torch.inf), x.new_zeros(length), torch.zeros_like(v)
        for first in range(0, length, block):
            J = slice(first, first + block)
            higher = torch.maximum(largest, x[:, J].amax(1))
            shrink, e = (largest - higher).exp(), (x[:, J] - higher[:, None]).exp()
            total, values = total * shrink + e.sum(1), values * shrink[:, None] + (M[:, J] * e) @ v[J]
            largest = higher
        L, online = largest + total.log(), values / total[:, None]
        P = (x - L[:, None]).exp()
        assert_close(P, x.softmax(-1))
        assert_close(online, expected[-1][0])
        assert M.eq(0).any()
        # Backward.
        delta = (g * online).sum(-1)
        assert_close(delta, (P * M * (g @ v.T)).sum(-1))
        dx = P * (M * (g @ v.T) - delta[:, None])
        assert_close(dx.sum(1), torch.zeros_like(delta), atol=1e-12, rtol=0)
        dq, dk, dv = scale * dx @ k, scale * dx.T @ q, (M * P).T @ g
        dr = torch.stack([dx[(i - j) == t].sum() for t in range(length)])
        for got, want in zip((dq, dk, dv), expected[-1][1:], strict=True):
            assert_close(got, want)
        sum_dr[:length] += dr
        sum_dq += dq.sum(0)
        # The turned tile.
        B = 16
        tile = torch.zeros(B, B, dtype=torch.float64)
        tile[:length, :length] = dx
        row, column = torch.arange(B)[:, None], torch.arange(B)[None, :]
        turned = tile.gather(1, (row + column + 1) % B)
        sums = turned.where(row + column >= B - 1, 0).sum(0).flip(0)  # column u has the distance B - 1 - u
        assert_close(sums[:length], dr)
        assert not turned.where(row + column < B - 1, 0).any()  # the future
        cu_seqlens = torch.tensor([0, length], dtype=torch.int32)
        op = distance_attention(*(y[:, None] for y in (q, k, v)), r.detach()[None], cu_seqlens, scale=scale)
        assert_close(op[:, 0], P @ v)
    assert_close(distance.grad[n:], sum_dr[:, None] * weight.detach())
    assert_close(distance.grad[:n], torch.zeros(n, width, dtype=torch.float64), atol=1e-12, rtol=0)
    assert_close(weight.grad, sum_dr @ distance.detach()[n:] + sum_dq / scale)
    assert_close(bias.grad, torch.zeros((), dtype=torch.float64), atol=1e-12, rtol=0)


def test_how_to_add_an_op_names_what_is_there():
    page = (DOCS / "adding-an-op.md").read_text()
    paths = re.findall(r"`((?:\w+/)+\w+\.\w+)`", page)
    assert len(paths) >= 10
    for path in paths:
        assert (ROOT / path).is_file(), path
    sources = "".join(file.read_text() for file in (ROOT / "cafe_kernels").rglob("*.py"))
    for block in re.findall(r"```python\n(.*?)```", page, re.S):
        for line in block.strip().splitlines():
            assert re.search(re.escape(line.strip()).replace(r"\(\):", r"\(\).*:"), sources), line


def test_the_memory_of_a_table():
    """docs/tuning.md's arithmetic."""
    page = (DOCS / "tuning.md").read_text()
    for name, dim in (("amazon", 128), ("tmall", 128), ("amazon", 64)):
        gigabytes = 3 * 4 * dim * (PRESETS[name].items + PRESETS[name].intents) / 1e9
        assert f"{name} at d = {dim}: {gigabytes:.2f} GB" in page


def messages() -> list[re.Pattern]:
    """Every text of the source with 12 letters or more, with anything in place of what is filled in."""
    found = []
    for file in [*(ROOT / "cafe").rglob("*.py"), *(ROOT / "cafe_kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [part.value if isinstance(part, ast.Constant) else None for part in parts]
            fixed = "".join(text for text in texts if isinstance(text, str))
            if len(fixed) >= 12 and all(text is None or isinstance(text, str) for text in texts):
                found.append(re.compile("".join(".*?" if text is None else re.escape(text) for text in texts)))
    return found


def test_the_errors_of_the_faq_exist():
    shown = re.findall(r"```text\n(.*?)\n```", (DOCS / "faq.md").read_text(), re.S)
    known = messages()
    assert len(shown) >= 30
    for message in shown:
        assert any(pattern.fullmatch(message) for pattern in known), message
    assert not any(pattern.fullmatch("a sequence of 60 tokens, but max_distance=50: cut it") for pattern in known)


def test_serving(tmp_path):
    user, item, intent = draw(Shop(interactions=2000, items=200, intents=10, users=250), seed=0)
    buys = [f"u{u},i{i},{time}" for time, (u, i) in enumerate(zip(user, item, strict=True))]
    (tmp_path / "buys.csv").write_text("\n".join(["user,item,timestamp", *buys]))
    (tmp_path / "items.csv").write_text("\n".join(["item,intent", *(f"i{i},c{c}" for i, c in enumerate(intent))]))
    prepare(tmp_path / "buys.csv", tmp_path / "items.csv", tmp_path / "data")
    dataset = prepare(tmp_path / "buys.csv", tmp_path / "items.csv")
    fit(Config.make("cafe", "best", epochs=2, dim=16), dataset, tmp_path / "runs/cafe", data=tmp_path / "data")

    def run(*arguments):
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
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


def test_links_lead_somewhere_in_the_repository():
    for page in [*DOCS.glob("*.md"), ROOT / "README.md", *ROOT.glob("benchmarks/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_site_is_built_without_a_warning(tmp_path):
    """mkdocs refuses broken links and anchors and pages that no navigation names; docs/hooks.py, what asks for something outside."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    for page, shown in {
        "index.html": 'href="benchmarks/RESULTS.html"',
        "data.html": 'href="benchmarks/index.html"',
        "benchmarks/RESULTS.html": 'href="../protocol.html"',
        "walkthrough.html": 'src="walkthrough/theta.png"',
        "api.html": 'id="cafe_kernels.distance_attention"',
    }.items():
        assert shown in (tmp_path / page).read_text(), page


def test_the_api_page_has_every_public_name():
    names = re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(), re.M)
    assert {f"cafe_kernels.{name}" for name in cafe_kernels.__all__} <= set(names)
    for name in names:
        module, _, leaf = name.rpartition(".")
        assert getattr(importlib.import_module(module), leaf).__doc__, name


def test_what_asks_for_something_outside_is_found():
    found = runpy.run_path(str(DOCS / "hooks.py"))["OUTSIDE"].search
    assert found('<img alt="x" src="https://example.org/x.png">')
    assert found("<link rel=stylesheet href=//example.org/x.css>")
    assert found('<style>@import url("https://example.org/x.css");</style>')
    assert not found('<a href="https://example.org">x</a> <script src="assets/x.js"></script><img src="a//b.png">')
