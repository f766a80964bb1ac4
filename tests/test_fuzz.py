"""bench/fuzz.py in short: random flags, damaged rows and files."""
import os
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.slow
def test_random_flags_and_damaged_files_end_in_one_line_or_a_sound_student():
    command = [sys.executable, os.path.join(ROOT, "bench", "fuzz.py"), "--flags", "40",
               "--rows", "60", "--files", "20"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["flags", "rows", "files"], result.stdout
    assert all(line.endswith("; 0 faults") for line in lines), result.stdout
