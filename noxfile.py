"""The tests on one release of each era of transformers' cache API: `make matrix`."""

import sysconfig
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"

RELEASES = ["4.52.4", "4.53.3", "4.55.4", "4.57.6", "5.0.0", "5.3.0", "5.8.1", "5.17.0", "5.23.0"]
ENDS = RELEASES[0], RELEASES[-1]  # these run the slow tests too

results: list[tuple] = []


@nox.session(reuse_venv=True)
@nox.parametrize("release", [nox.param(release, id=release) for release in RELEASES])
def tests(session: nox.Session, release: str) -> None:
    """Run the tests with this release of transformers."""
    session.notify("table")
    if release >= "5.8" and sysconfig.get_python_version() < "3.11":
        results.append((release, "none", "", "", "", "it needs Python 3.11"))
        session.skip(f"transformers {release} needs Python 3.11")
    # What every environment needs in the same version, torch above all, is found where nox itself is installed.
    libraries = Path(session.virtualenv.location).glob("lib/python*/site-packages")
    (next(libraries) / "shared.pth").write_text(sysconfig.get_path("purelib"))
    session.install("--quiet", "--ignore-installed", f"transformers=={release}")
    report = Path(session.create_tmp()) / "report.xml"
    suite = ("all", []) if release in ENDS else ("not slow", ["-m", "not slow"])
    session.run("python", "-m", "pytest", f"--junitxml={report}", *suite[1], *session.posargs, success_codes=[0, 1])
    outcomes, reasons = Counter(), Counter()
    for case in ElementTree.parse(report).iter("testcase"):
        outcome = next((child for child in case if child.tag in ("skipped", "failure", "error")), None)
        outcomes["passed" if outcome is None else outcome.tag] += 1
        if outcome is not None and outcome.tag == "skipped":
            reasons[outcome.get("message")] += 1
    failed = outcomes["failure"] + outcomes["error"]
    why = "; ".join(f"{count}: {reason}" for reason, count in reasons.items())
    results.append((release, suite[0], outcomes["passed"], failed, outcomes["skipped"], why))
    if failed:
        session.error(f"{failed} tests failed with transformers {release}")


@nox.session(python=False, default=False)
def table(session: nox.Session) -> None:
    """Show what the sessions before found."""
    for row in [("transformers", "tests", "passed", "failed", "skipped", "why"), *results]:
        print("{:<13} {:<9} {:>7} {:>7} {:>8}  {}".format(*row).rstrip())
