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

RELEASES = ["4.52.4", "4.53.3", "4.55.4", "4.56.2", "4.57.6", "5.0.0", "5.3.0", "5.8.1", "5.17.0", "5.24.0"]
ENDS = RELEASES[0], RELEASES[-1]  # these run the slow tests too
# What they show hardly depends on the release: these files run on the newest one only.
NEWEST_ONLY = [
    "arguments",
    "chat",
    "damaged",
    "device",
    "files",
    "in_use",
    "installed",
    "modes",
    "numerics",
    "own_generate",
    "programs",
    "push",
]
NEWEST_ONLY += ["published", "reading", "reading_again", "readme", "rotation", "synced", "tensor_parallel"]
# And these on the two ends only.
ENDS_ONLY = ["flash", "unbound", "wrappers"]
FOR_PYTHON_3_11 = ["5.8.1", "5.17.0", "5.24.0"]

rows = []


@nox.session(venv_params=["--without-pip"])
@nox.parametrize("release", [nox.param(release, id=release) for release in RELEASES])
def tests(session: nox.Session, release: str) -> None:
    """Run the tests with this release of transformers."""
    session.notify("table")
    if release in FOR_PYTHON_3_11 and sys.version_info < (3, 11):
        rows.append((release, "none", 0, 0, 0, "it needs Python 3.11"))
        session.skip(f"transformers {release} needs Python 3.11")
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

    suite, selected = ("all", []) if release in ENDS else ("not slow", ["-m", "not slow"])
    left_out = [] if release == RELEASES[-1] else NEWEST_ONLY if release in ENDS else NEWEST_ONLY + ENDS_ONLY
    selected += [f"--ignore=tests/test_{name}.py" for name in left_out]
    report = Path(session.create_tmp()) / "report.xml"
    report.unlink(missing_ok=True)
    # Of two processes, the one that is done first takes tests from the other.
    pytest = ("python", "-m", "pytest", "--numprocesses=2", "--dist=worksteal", f"--junitxml={report}")
    # Passed; tests failed; not even all collected.
    ran = session.run(*pytest, *selected, *session.posargs, success_codes=range(3))
    if ran is None:  # with --install-only
        return
    outcomes, reasons = Counter(), Counter()
    for case in ElementTree.parse(report).iter("testcase"):
        outcome = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        outcomes["passed" if outcome is None else outcome.tag] += 1
        if outcome is not None and outcome.tag == "skipped":
            reasons[outcome.get("message")] += 1
    failed = outcomes["failure"] + outcomes["error"]
    why = "; ".join(f"{count}: {reason}" for reason, count in reasons.items())
    rows.append((release, suite, outcomes["passed"], failed, outcomes["skipped"], why))
    if failed or not outcomes["passed"]:
        session.error(f"{failed} tests failed with transformers {release}")


@nox.session(python=False)
def table(session: nox.Session) -> None:
    """Show what the sessions before found."""
    for row in [("transformers", "tests", "passed", "failed", "skipped", "why"), *rows]:
        print("{:<13} {:<9} {:>7} {:>7} {:>8}  {}".format(*row).rstrip())
