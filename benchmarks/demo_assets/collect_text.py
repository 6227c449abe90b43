"""Rebuild the demo's texts from public packages whose licences allow shipping them.

The idea: five domains of real text (English for the base; Japanese, Chinese, Python code and
mathematics for the vectors), each written as ``<domain>.jsonl.xz`` with one document a row:
``{"split": "base" | "cpt" | "dev" | "test", "source": ..., "text": ...}``. Base text pretrains
the shipped base, cpt text trains the vectors, dev text guides the search, and test text is read
once, for the final tables.

The alternative, downloading corpora when the demo runs, would need a network and a hub, and most
freely readable text is under share-alike licences that this repository cannot ship. The price is
size: about a megabyte or two of text a domain, much of it technical.

Splits are made of whole documents (a page, a source file, a run of neighbouring messages or
theorems), so that no document is cut between two of them; duplicate lines inside a domain go, and
long lines of dev and test that also stand in base or cpt go as well.

Run with Python 3.11 (the code domain is its standard library)::

    python benchmarks/demo_assets/collect_text.py --packages /tmp/demo-packages

``npm`` and, for the one Debian package, ``apt-get`` and ``dpkg-deb`` must be on PATH. The packages
(about 130 MB) are kept in the folder given.
"""

from __future__ import annotations

import argparse
import html
import json
import lzma
import random
import re
import subprocess
import sys
import sysconfig
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

NPM = {
    "electron": ("electron-i18n", "1.3136.0"),
    "vscode-ja": ("@codingame/monaco-vscode-language-pack-ja", "25.1.2"),
    "vscode-zh": ("@codingame/monaco-vscode-language-pack-zh-hans", "25.1.2"),
    "typescript": ("typescript", "5.9.3"),
    "node-red": ("@node-red/nodes", "5.0.7"),
    "openclaw": ("openclaw", "2026.9.6"),
    "openclaw-cn": ("openclaw-cn", "2026.1.31"),
}
METAMATH = ("metamath-databases", "0.0.0~20210101.git55fe226-2")  # a Debian package
SIZES = {  # bytes of base, dev and test; all the rest is cpt
    "en": {"base": 1 << 40, "dev": 80_000, "test": 80_000},
    "ja": {"base": 900_000, "dev": 90_000, "test": 90_000},
    "zh": {"base": 550_000, "dev": 90_000, "test": 90_000},
    "code": {"base": 1_000_000, "dev": 90_000, "test": 90_000},
    "math": {"base": 750_000, "dev": 90_000, "test": 90_000},
}
CAP_BYTES = {"en": 4_000_000, "code": 2_300_000, "math": 2_200_000}
MESSAGES_PER_DOCUMENT = 40
THEOREMS_PER_DOCUMENT = 20
LEAK_BYTES = 40  # a dev or test line at least this long must not stand in base or cpt

KANA = re.compile(r"[\u3040-\u30ff]")
HAN = re.compile(r"[\u4e00-\u9fff]")


class Document(NamedTuple):
    """A text that is never cut between two splits."""

    source: str
    text: str


def is_japanese(line: str) -> bool:
    """At least a tenth of it is kana."""
    return len(KANA.findall(line)) >= max(2, 0.1 * len(line))


def is_chinese(line: str) -> bool:
    """At least a fifth of it is Han and none of it kana."""
    return not KANA.search(line) and len(HAN.findall(line)) >= max(3, 0.2 * len(line))


def is_english(line: str) -> bool:
    """A sentence in ASCII."""
    return len(line) >= 20 and line.isascii() and len(line.split()) >= 4


SPEAKS = {"ja": is_japanese, "zh": is_chinese, "en": is_english}


def fetch(packages: Path) -> dict[str, Path]:
    """The folder of each npm package, downloaded at its fixed version when not there yet."""
    folders = {}
    for key, (name, version) in NPM.items():
        folder = packages / f"{key}-{version}"
        if not folder.exists():
            made = subprocess.run(
                ["npm", "pack", f"{name}@{version}", "--silent"],
                cwd=packages,
                check=True,
                capture_output=True,
                text=True,
            )
            with tarfile.open(packages / made.stdout.split()[-1]) as archive:
                archive.extractall(folder, filter="data")
        (folders[key],) = (path for path in folder.iterdir() if path.is_dir())
    return folders


def html_lines(page: str) -> list[str]:
    """Block-level text of a page, one block a line, code listings left out."""
    page = re.sub(r"<pre.*?</pre>|<!--.*?-->|<script.*?>|</script>", "\n", page, flags=re.S)
    page = re.sub(
        r"</?(p|li|h\d|tr|ul|ol|dl|dt|dd|div|table|td|th|blockquote|br)\b[^>]*>", "\n", page
    )
    page = html.unescape(re.sub(r"<[^>]+>", "", page))
    return [" ".join(line.split()) for line in page.split("\n")]


def markdown_lines(page: str) -> list[str]:
    """Lines of a Markdown page without front matter and fenced listings."""
    page = re.sub(r"\A---\n.*?\n---\n", "", page, flags=re.S)
    return re.sub(r"```.*?```", "", page, flags=re.S).split("\n")


def keep(source: str, lines: Iterable[str], speaks: Callable[[str], bool]) -> Iterator[Document]:
    """One page, just its lines in the language wanted."""
    text = "\n".join(line.strip() for line in lines if speaks(line))
    if text:
        yield Document(source, text)


def messages(
    source: str, texts: Iterable[str], speaks: Callable[[str], bool]
) -> Iterator[Document]:
    """Neighbouring messages together, so that one dialog's strings stay in one split."""
    lines = [line for text in texts for line in text.replace("\r", "").split("\n") if speaks(line)]
    for start in range(0, len(lines), MESSAGES_PER_DOCUMENT):
        yield Document(source, "\n".join(lines[start : start + MESSAGES_PER_DOCUMENT]))


def leaves(value: object) -> Iterator[str]:
    """Every string in a JSON value, in order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from leaves(item)


def electron(folder: Path, locale: str, domain: str) -> Iterator[Document]:
    """Documentation of Electron, a page a document."""
    pages = json.loads((folder / "dist/docs.json").read_text(encoding="utf-8"))[locale]
    for page in pages.values():
        yield from keep("electron-i18n", html_lines(page["html"]), SPEAKS[domain])


def vscode(folder: Path, domain: str) -> Iterator[Document]:
    """Editor messages: a JavaScript array of string literals, and JSON per extension."""
    script = (folder / "translations/main.i18n.json.js").read_text(encoding="utf-8")
    literals = re.findall(r'^\s*("(?:[^"\\]|\\.)*"),?$', script, flags=re.M)
    strings = (re.sub(r"\(?&&\w\)?", "", json.loads(literal)) for literal in literals)
    yield from messages("vscode", strings, SPEAKS[domain])
    for path in sorted((folder / "translations/extensions").glob("*.json")):
        contents = json.loads(path.read_text(encoding="utf-8"))["contents"]
        yield from messages("vscode", leaves(contents), SPEAKS[domain])


def typescript(folder: Path, locale: str, domain: str) -> Iterator[Document]:
    """Compiler messages."""
    path = folder / "lib" / locale / "diagnosticMessages.generated.json"
    strings = json.loads(path.read_text(encoding="utf-8")).values()
    yield from messages("typescript", strings, SPEAKS[domain])


def node_red(folder: Path, locale: str, domain: str) -> Iterator[Document]:
    """Help of the nodes, a file a document."""
    for path in sorted((folder / "locales" / locale).rglob("*.html")):
        yield from keep("node-red", html_lines(path.read_text(encoding="utf-8")), SPEAKS[domain])


def openclaw(folder: Path, source: str, domain: str) -> Iterator[Document]:
    """Documentation in Markdown, a page a document."""
    for path in sorted((folder / "docs").rglob("*.md")):
        lines = markdown_lines(path.read_text(encoding="utf-8"))
        yield from keep(source, lines, SPEAKS[domain])


def python_topics() -> Iterator[Document]:
    """The help topics of the interpreter."""
    from pydoc_data.topics import topics

    for text in topics.values():
        yield Document("python-docs", text.strip())


def python_code() -> Iterator[Document]:
    """Standard library modules, without tests, data tables and files under terms of their own."""
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"test", "tests", "idle_test", "site-packages", "pydoc_data", "encodings", "lib2to3"}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if skip & set(parts) or parts[0].startswith(("_sysconfigdata", "config-")):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        if text.isascii() and 500 < len(text) < 60_000 and "opyright" not in text[:6000]:
            yield Document("python-stdlib", text.strip())


def mathematics(packages: Path) -> Iterator[Document]:
    """Theorems of set.mm: what a theorem says in words, then in symbols; proofs are left out."""
    name, version = METAMATH
    folder = packages / f"{name}-{version}"
    if not folder.exists():
        subprocess.run(["apt-get", "download", f"{name}={version}"], cwd=packages, check=True)
        (archive,) = packages.glob(f"{name}_*.deb")
        subprocess.run(["dpkg-deb", "-x", archive, folder], check=True)
    text = (folder / "usr/share/metamath/databases/set.mm").read_text(encoding="utf-8")
    theorem = re.compile(
        r"\$\(((?:(?!\$\)).)*?)\$\)\s+(\S+)\s+\$[ap]\s+(\|-.*?)\s\$[.=]", flags=re.S
    )
    found = [
        " ".join(re.sub(r"\((?:Contributed|Proof|Revised|New|See)[^()]*\)", "", words).split())
        + f"\n{label}: {' '.join(statement.split())}"
        for words, label, statement in theorem.findall(text)
    ]
    for start in range(0, len(found), THEOREMS_PER_DOCUMENT):
        chunk = found[start : start + THEOREMS_PER_DOCUMENT]
        yield Document("metamath", "\n".join(chunk))


def line_key(line: str) -> str:
    """What makes two lines the same: their letters and digits, whatever their case."""
    return "".join(re.findall(r"\w+", line.casefold()))


def without_repeats(documents: Iterable[Document], domain: str) -> Iterator[Document]:
    """Prose: each line once in a domain. Code: each file once."""
    seen: set[str] = set()
    for document in documents:
        if domain == "code":
            fresh = [document.text] if line_key(document.text) not in seen else []
            seen.add(line_key(document.text))
        else:
            fresh = []
            for line in document.text.split("\n"):
                if line_key(line) and line_key(line) not in seen:
                    seen.add(line_key(line))
                    fresh.append(line)
        if fresh:
            yield Document(document.source, "\n".join(fresh))


def split(documents: list[Document], domain: str) -> list[tuple[str, Document]]:
    """Shuffle documents and deal them out; long ones never land in dev or test."""
    random.Random(f"optimer {domain}").shuffle(documents)
    left = dict(SIZES[domain])
    rows: list[tuple[str, Document]] = []
    total_bytes = 0
    for document in documents:
        size_bytes = len(document.text.encode())
        if total_bytes + size_bytes > CAP_BYTES.get(domain, 1 << 40):
            continue
        total_bytes += size_bytes
        wanted = ("base",) if size_bytes > 15_000 else ("test", "dev", "base")
        name = next((name for name in wanted if left[name] > 0), "cpt")
        if name != "cpt":
            left[name] -= size_bytes
        rows.append((name, document))
    train = {
        line_key(line)
        for name, document in rows
        if name in ("base", "cpt")
        for line in document.text.split("\n")
    }
    clean = []
    for name, document in rows:
        if name in ("dev", "test"):
            kept = (
                line
                for line in document.text.split("\n")
                if len(line.encode()) < LEAK_BYTES or line_key(line) not in train
            )
            document = Document(document.source, "\n".join(kept))
        if document.text.strip():
            clean.append((name, document))
    return clean


def collect(packages: Path, out: Path) -> None:
    """Write every domain's file into `out`."""
    folders = fetch(packages)
    sources: dict[str, list[Iterator[Document]]] = {
        "en": [
            python_topics(),
            electron(folders["electron"], "en-US", "en"),
            openclaw(folders["openclaw"], "openclaw", "en"),
        ],
        "ja": [
            electron(folders["electron"], "ja-JP", "ja"),
            vscode(folders["vscode-ja"], "ja"),
            typescript(folders["typescript"], "ja", "ja"),
            node_red(folders["node-red"], "ja", "ja"),
        ],
        "zh": [
            electron(folders["electron"], "zh-CN", "zh"),
            openclaw(folders["openclaw-cn"], "openclaw-cn", "zh"),
            vscode(folders["vscode-zh"], "zh"),
            typescript(folders["typescript"], "zh-cn", "zh"),
            node_red(folders["node-red"], "zh-CN", "zh"),
        ],
        "code": [python_code()],
        "math": [mathematics(packages)],
    }
    out.mkdir(parents=True, exist_ok=True)
    for domain, parts in sources.items():
        documents = list(without_repeats((d for part in parts for d in part), domain))
        rows = split(documents, domain)
        lines = (
            json.dumps({"split": name, "source": d.source, "text": d.text}, ensure_ascii=False)
            for name, d in rows
        )
        path = out / f"{domain}.jsonl.xz"
        text = "\n".join(lines) + "\n"
        path.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
        sizes: Counter[str] = Counter()
        for name, document in rows:
            sizes[name] += len(document.text.encode())
            sizes[document.source] += len(document.text.encode())
        print(f"{domain}: {path.stat().st_size} bytes packed; {dict(sizes)}", file=sys.stderr)


if __name__ == "__main__":
    here = Path(__file__).resolve()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=Path, required=True, help="folder for the packages")
    parser.add_argument(
        "--out", type=Path, default=here.parents[2] / "optimer_engine/demo/assets/text"
    )
    arguments = parser.parse_args()
    arguments.packages.mkdir(parents=True, exist_ok=True)
    collect(arguments.packages.resolve(), arguments.out)
