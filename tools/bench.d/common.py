"""What the commands of tools/bench share."""

import subprocess
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent.parent


def shell(script: str) -> str:
    """What a piece of bash prints, with the tools' functions at hand; its messages go to stderr."""
    prelude = f'set -euo pipefail; export TOOL=bench; cd "{REPO}"; for l in packages places build; do . "tools/lib/$l.sh"; done; '
    return subprocess.run(["bash", "-c", prelude + script], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
