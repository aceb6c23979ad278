"""What the tests of faults share."""

import pytest
from conftest import run_ranks
from faults.runs import command


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory, synthetic):
    """metrics.jsonl of a run that nothing happens to."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    run_ranks([*command(folder, synthetic, retrieval=None), "--output_dir", str(folder / "run")], 2)
    return (folder / "run" / "metrics.jsonl").read_text()
