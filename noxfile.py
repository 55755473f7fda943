"""The tests on one release of each era of transformers' cache API: `make matrix`."""

import sys
import sysconfig
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import nox

nox.options.sessions = ["tests"]
nox.options.default_venv_backend = "venv"
nox.options.reuse_venv = "yes"

# Each with the oldest Python that it needs, if it says one.
RELEASES = [line.split() for line in Path("tests/releases.txt").read_text().splitlines() if line[0] != "#"]

rows = []


@nox.session(venv_params=["--without-pip"])
@nox.parametrize("release, pythons", [nox.param(release, pythons, id=release) for release, *pythons in RELEASES])
def tests(session: nox.Session, release: str, pythons: list[str]) -> None:
    """Run the tests with this release of transformers; `tests/conftest.py` leaves out those that are for others."""
    session.notify("table")
    if any(sys.version_info < tuple(map(int, python.split("."))) for python in pythons):
        rows.append((release, 0, 0, 0, 0, f"it needs Python {pythons[0]}"))
        session.skip(rows[-1][-1])
    # What is the same for all, torch and pip among it, is installed once: where nox is.
    shared = Path(sysconfig.get_path("purelib"))
    libraries = next(Path(session.virtualenv.location).glob("lib/python*/site-packages"))
    (libraries / "shared.pth").write_text(str(shared))
    information = f"transformers-{release}.dist-info"
    if not (libraries / information).exists():
        # The shared release too, as its program `transformers` is tried.
        again = ["--ignore-installed", "--no-deps"] if (shared / information).exists() else []
        # Python compiles what is imported; all of it takes as long as the rest of the installation.
        session.install("--quiet", "--no-compile", *again, f"transformers=={release}")

    report = Path(session.create_tmp()) / "report.xml"
    report.unlink(missing_ok=True)
    # Of two processes, the one that is done first takes tests from the other. Between the ends they have less to do
    # than a second one takes to start.
    ends = RELEASES[0][0], RELEASES[-1][0]
    processes = ["--numprocesses=2", "--dist=worksteal"] if release in ends else []
    pytest = ("python", "-m", "pytest", *processes, f"--junitxml={report}")
    # Passed; tests failed; not even all collected.
    ran = session.run(*pytest, *session.posargs, success_codes=range(3))
    if ran is None:  # with --install-only
        return
    outcomes, reasons = Counter(), Counter()
    results = ElementTree.parse(report)
    left_out = sum(int(each.get("value")) for each in results.iter("property") if each.get("name") == "left out")
    for case in results.iter("testcase"):
        outcome = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        outcomes["passed" if outcome is None else outcome.tag] += 1
        if outcome is not None and outcome.tag == "skipped":
            reasons[outcome.get("message")] += 1
    failed = outcomes["failure"] + outcomes["error"]
    why = "; ".join(f"{count}: {reason}" for reason, count in reasons.items())
    rows.append((release, outcomes["passed"], failed, left_out, outcomes["skipped"], why))
    if failed or not outcomes["passed"]:
        session.error(f"{failed} tests failed with transformers {release}")


@nox.session(python=False)
def table(session: nox.Session) -> None:
    """Show what the sessions before found."""
    for row in [("transformers", "passed", "failed", "left out", "skipped", "why"), *rows]:
        print("{:<13} {:>7} {:>7} {:>9} {:>8}  {}".format(*row).rstrip())
