"""The code blocks of a page of the documentation, and running them as they stand.

- A ``bash`` block is run, in order, all of a page in one shell.
- A ``text`` block right after a ``bash`` block says what that prints: each of its lines,
  where ``...`` stands for anything and spaces do not count. Of ``text measured``, the
  figures of one run on one machine, the first line alone.
- A ``python`` block that begins with ``# NAME.py`` is that file, in the working folder.

What is shown and not run is a ``shell`` block.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
MARK = '=== block'


class Block(NamedTuple):
    """A fenced block: what stands behind the fence, and what is in it."""

    kind: str
    text: str


def read_blocks(page: str, kind: str = '') -> list[Block]:
    """The fenced blocks of a page, in order; of one kind if that is given."""
    text = (ROOT / page).read_text()
    found = re.findall(r'^```([^\n`]+)\n(.*?)^```$', text, re.MULTILINE | re.DOTALL)
    return [Block(*block) for block in found if kind in ('', block[0])]


def write_files(blocks: list[Block], folder: Path) -> None:
    """Write the files that a page shows."""
    for block in blocks:
        name = re.match(r'# (\w+\.py)\n', block.text)
        if block.kind == 'python' and name:
            (folder / name[1]).write_text(block.text)


def run_page(page: str, folder: Path, timeout: int = 3600) -> None:
    """Run the commands of a page in a folder that looks like the repository.

    Args:
        page (str): Path of the page, from the root of the repository.
        folder (Path): An empty folder, or one with the data that the page names.
        timeout (int): Seconds.

    Raises:
        AssertionError: For a command that fails, and for a line of a ``text`` block
            that is not printed; with what is.
    """
    for name in ('configs', 'tools', 'benchmarks'):
        (folder / name).symlink_to(ROOT / name)
    blocks = read_blocks(page)
    write_files(blocks, folder)
    script = ['set -eo pipefail', 'exec 2>&1']
    for i, block in enumerate(blocks):
        if block.kind == 'bash':
            script += [f'echo "{MARK} {i}"', block.text]
    done = subprocess.run(
        ['bash', '-c', '\n'.join(script)],
        cwd=folder,
        env=dict(
            os.environ,
            PATH=f'{Path(sys.executable).parent}:{os.environ["PATH"]}',
            PYTHONPATH=str(ROOT),
        ),
        stdout=subprocess.PIPE,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    printed = re.split(rf'^{MARK} (\d+)\n', done.stdout, flags=re.MULTILINE)[1:]
    printed = dict(zip(map(int, printed[::2]), printed[1::2], strict=True))
    for i, output in printed.items():
        said = blocks[i + 1] if i + 1 < len(blocks) else Block('', '')
        if said.kind.startswith('text'):
            lines = said.text.splitlines()
            for line in lines[:1] if 'measured' in said.kind else lines:
                assert is_printed(line, output), f'{line}\n\n{output}'


def is_printed(line: str, output: str) -> bool:
    """Whether a line of a ``text`` block is one of the output, or a part of one."""
    parts = [r'\s+'.join(map(re.escape, part.split())) for part in line.split('...')]
    return any(re.search('.*'.join(parts), shown) for shown in output.splitlines())
