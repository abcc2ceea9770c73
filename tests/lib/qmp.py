#!/usr/bin/env python3
"""One command to a QEMU that listens on a QMP socket: qmp.py SOCKET COMMAND [ARGUMENTS [FIELD...]]

ARGUMENTS is a JSON object. Prints what the command returns as JSON, or only those fields of it, a line each (a.b is field
b of field a; a field that is not there is `-`). An error is one line, status 1.
"""

import json
import socket
import sys


def main() -> int:
    if len(sys.argv) < 3 or sys.argv[1] in ("--help", "-h"):
        print(__doc__.strip())
        return 0 if len(sys.argv) > 1 and sys.argv[1] in ("--help", "-h") else 2
    path, command = sys.argv[1:3]
    arguments = json.loads(sys.argv[3]) if len(sys.argv) > 3 else {}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(30)
        connection.connect(path)
        lines = connection.makefile("rw")
        lines.readline()  # the greeting
        call(lines, "qmp_capabilities", {})
        answer = call(lines, command, arguments)
    if "error" in answer:
        print(f"{command}: {answer['error']['desc']}", file=sys.stderr)
        return 1
    if len(sys.argv) <= 4:
        print(json.dumps(answer["return"]))
    for field in sys.argv[4:]:
        value = answer["return"]
        for part in field.split("."):
            value = value.get(part, "-") if isinstance(value, dict) else "-"
        print(value)
    return 0


def call(lines, command: str, arguments: dict) -> dict:
    """The answer to one command; events before it are passed over."""
    lines.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
    lines.flush()
    while True:
        answer = json.loads(lines.readline())
        if "return" in answer or "error" in answer:
            return answer


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (OSError, ValueError) as error:
        print(f"qmp.py: {error}", file=sys.stderr)
        sys.exit(1)
