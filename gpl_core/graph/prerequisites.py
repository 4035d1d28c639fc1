"""Check what pip cannot install: Python 3.11, Java 17 or 21, a C++ compiler. Runs on any Python 3 without packages."""

import re
import shutil
import subprocess
import sys


def problems() -> list[str]:
    """One line per missing prerequisite that says what to install."""
    found = []
    if sys.version_info[:2] != (3, 11):
        here = ".".join(map(str, sys.version_info[:2]))
        found.append(
            f"Python 3.11 is needed (pyarrow 14 and Petastorm stop there), this is {here}: install python3.11 and run "
            "make PYTHON=/path/to/python3.11"
        )
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        found.append("this Python has no venv module: install python3.11-venv (Debian, Ubuntu)")
    java = shutil.which("java")
    if java is None:
        found.append("Java 17 is needed by Spark: install openjdk-17-jre-headless, or put its bin folder on PATH")
    else:
        text = subprocess.run([java, "-version"], capture_output=True, text=True, check=False).stderr
        match = re.search(r'version "(\d+)', text)
        if not match or int(match.group(1)) not in (17, 21):
            said = text.splitlines()[0] if text else "nothing"
            found.append(f"Java 17 (or 21) is needed by Spark 4.0; '{java} -version' says: {said}")
    if not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
        found.append("a C++ compiler is needed: DeepSpeed compiles its CPU operators once: install g++")
    return found


if __name__ == "__main__":
    missing = problems()
    for line in missing:
        print("missing: " + line, file=sys.stderr)
    sys.exit(2 if missing else 0)
