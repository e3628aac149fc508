"""Says at the end of a run which chapters of the book were executed, and how they ended."""


def pytest_terminal_summary(terminalreporter):
    ended = {
        report.nodeid.split("[")[1].rstrip("]"): outcome
        for outcome in ("passed", "failed", "error")
        for report in terminalreporter.stats.get(outcome, [])
        if "test_chapter_executes[" in report.nodeid
    }
    if ended:
        terminalreporter.section(f"{len(ended)} chapters executed")
        for chapter, outcome in ended.items():
            terminalreporter.line(f"book/{chapter}.py  {outcome}")
