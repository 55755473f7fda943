from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
# Of transformers, oldest first.
RELEASES = [line.split()[0] for line in (ROOT / "tests/releases.txt").read_text().splitlines() if line[0] != "#"]
