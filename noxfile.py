"""The tests on a release of each era of transformers' cache API: `make matrix`. On what is new: `make ahead`."""

import json
import sys
import sysconfig
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import nox
from nox.command import CommandFailed

nox.options.sessions = ["tests"]
nox.options.default_venv_backend = "venv"
nox.options.reuse_venv = "yes"

# Each with the oldest Python that it needs, if it says one.
RELEASES = [line.split() for line in Path("tests/releases.txt").read_text().splitlines() if line[0] != "#"]

# Where nox is, and with it what all sessions share.
SHARED = Path(sysconfig.get_path("purelib"))

# Of the table: one for each session, and the tests that failed in all of them.
rows: list[tuple] = []
failures: list[str] = []


@nox.session(venv_params=["--without-pip"])
@nox.parametrize("release, pythons", [nox.param(release, pythons, id=release) for release, *pythons in RELEASES])
def tests(session: nox.Session, release: str, pythons: list[str]) -> None:
    """Run the tests with this release of transformers; `tests/conftest.py` leaves out those that are for others."""
    session.notify("table")
    if any(sys.version_info < tuple(map(int, python.split("."))) for python in pythons):
        rows.append((release, 0, 0, 0, 0, f"it needs Python {pythons[0]}"))
        session.skip(rows[-1][-1])
    install(session, release)
    # Of two processes, the one that is done first takes tests from the other. Between the ends they have less to do
    # than a second one takes to start.
    ends = RELEASES[0][0], RELEASES[-1][0]
    if not passes(session, release, 2 if release in ends else 1, *session.posargs):
        session.error(f"{rows[-1][2]} tests failed with transformers {release}")


@nox.session(venv_params=["--without-pip"])
@nox.parametrize("options", [nox.param([], id="release"), nox.param(["--pre"], id="pre-release")])
def ahead(session: nox.Session, options: list[str]) -> None:
    """Run the fast tests and the sweep of architectures on the newest release of the index, and its pre-release.

    It runs on a release that is tested already too: what transformers brings along has releases of its own.
    """
    session.notify("table")
    share_libraries(session)
    release = newest(session)
    if options:
        before, release = release, newest(session, *options)
        if release == before:
            rows.append(("pre-release", 0, 0, 0, 0, f"the index has none that is newer than {before}"))
            session.skip(rows[-1][-1])
    install(session, release)
    # Who chooses by marks gets the tests for the newest release too: `tests/conftest.py` leaves out none.
    right = passes(session, release, 2, "-m", "not slow", *session.posargs)
    errors = Path(session.create_tmp()) / "errors.txt"
    try:
        with errors.open("w") as file:
            session.run("python", "-m", "tools.architectures", "--ahead", stderr=file)
    except CommandFailed:
        print(said := errors.read_text().strip())
        failures.append(f"{release}: the sweep of architectures: " + said.split("\n")[-1])
        right = False
    if not right:
        session.error(f"transformers {release} fails, where the lines under the table say")


@nox.session(python=False)
def table(session: nox.Session) -> None:
    """Show what the sessions before found."""
    for row in [("transformers", "passed", "failed", "left out", "skipped", "why"), *rows]:
        print("{:<13} {:>7} {:>7} {:>9} {:>8}  {}".format(*row).rstrip())
    for line in ["", "These fail:", *failures] if failures else []:
        print(line)


def share_libraries(session: nox.Session) -> Path:
    """Give the session what is the same for all, torch and pip among it: it is installed once, where nox is.

    Returns the folder of the session's own libraries.
    """
    libraries = next(Path(session.virtualenv.location).glob("lib/python*/site-packages"))
    (libraries / "shared.pth").write_text(SHARED.as_posix())
    return libraries


def newest(session: nox.Session, *options: str) -> str:
    """The newest transformers of the index; with "--pre", a pre-release if one is newer.

    One that this Python can't have as well, so that the installation says it.
    """
    found = Path(session.create_tmp()) / "newest.json"
    pip = ("python", "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps")
    session.run_install(*pip, "--ignore-requires-python", f"--report={found}", *options, "transformers")
    return json.loads(found.read_text())["install"][0]["metadata"]["version"]


def install(session: nox.Session, release: str) -> None:
    """Install a release of transformers, and what it needs in place of what is shared."""
    libraries, information = share_libraries(session), f"transformers-{release}.dist-info"
    if not (libraries / information).exists():
        # The shared release too, as its program `transformers` is tried.
        again = ["--ignore-installed", "--no-deps"] if (SHARED / information).exists() else []
        # Python compiles what is imported; all of it takes as long as the rest of the installation.
        session.install("--quiet", "--no-compile", *again, f"transformers=={release}")


def passes(session: nox.Session, release: str, processes: int, *arguments: str) -> bool:
    """Run the tests, write down their row of the table, and say whether they pass."""
    report = Path(session.create_tmp()) / "report.xml"
    report.unlink(missing_ok=True)
    in_turns = [f"--numprocesses={processes}", "--dist=worksteal"] if processes > 1 else []
    pytest = ("python", "-m", "pytest", *in_turns, f"--junitxml={report}")
    # Passed; tests failed; not even all collected.
    ran = session.run(*pytest, *arguments, success_codes=range(3))
    if ran is None:  # with --install-only
        return True
    outcomes, reasons = Counter(), Counter()
    results = ElementTree.parse(report)
    left_out = sum(int(each.get("value")) for each in results.iter("property") if each.get("name") == "left out")
    for case in results.iter("testcase"):
        outcome = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        outcomes["passed" if outcome is None else outcome.tag] += 1
        if outcome is not None and outcome.tag == "skipped":
            reasons[outcome.get("message")] += 1
        elif outcome is not None:
            failures.append(f"{release}: {case.get('classname')}::{case.get('name')}")
    failed = outcomes["failure"] + outcomes["error"]
    why = "; ".join(f"{count}: {reason}" for reason, count in reasons.items())
    rows.append((release, outcomes["passed"], failed, left_out, outcomes["skipped"], why))
    return bool(outcomes["passed"]) and not failed
