"""What `make fuzz` says at its end."""

from tests.fuzz.mutations import CASES, SEEN


def pytest_terminal_summary(terminalreporter):
    if CASES <= 500:
        return
    for name, seen in SEEN.items():
        terminalreporter.write_line(f"{name}: {seen['accepted']} accepted, {seen['refused']} refused")
