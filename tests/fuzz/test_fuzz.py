"""The drawn tests under pytest: a minute of cases on the CPU, and what keeps the tests themselves complete.

QUANTRAIN_FUZZ_SEED: a number, or "random"; QUANTRAIN_FUZZ_SECONDS: how long (default 60).
"""

import os
import random
import subprocess
import sys
from pathlib import Path

import draw
import known
import modules
import pytest
import torch
from hostile_arguments import ARGUMENTS

import quantrain

modules.load()
RUN = Path(__file__).resolve().parent / "run.py"


def run(*arguments, seconds):
    seed = os.environ.get("QUANTRAIN_FUZZ_SEED", "15")
    seed = str(random.SystemRandom().randrange(2**31)) if seed == "random" else seed
    command = [sys.executable, str(RUN), "--seed", seed, "--seconds", str(seconds), *arguments]
    print(f"seed {seed}")  # shown where the test fails
    result = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 600, check=False)
    print(result.stdout, result.stderr)
    return result


def test_drawn_cases():
    seconds = float(os.environ.get("QUANTRAIN_FUZZ_SECONDS", "60"))
    result = run("--workers", str(min(2, os.cpu_count() or 1)), seconds=seconds)
    failures = [line for line in result.stdout.splitlines() if line.startswith("FAILED ")]
    assert result.returncode == 0 and not failures, "\n".join(
        failures or [result.stdout[-2000:] + result.stderr[-2000:]]
    )


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_drawn_cases_on_cuda():
    result = run("--device", "cuda", "--workers", str(min(8, os.cpu_count() or 1)), seconds=30)
    failures = [line for line in result.stdout.splitlines() if line.startswith("FAILED ")]
    assert result.returncode == 0 and not failures, "\n".join(
        failures or [result.stdout[-2000:] + result.stderr[-2000:]]
    )


def test_every_operator_is_drawn():
    covered = {name for _, covers in draw.DRAWN.values() for name in covers}
    missing = [name for name in modules.schemas() if name not in covered and name not in modules.LEFT_OUT]
    assert not missing, f"operators without a drawn test in tests/fuzz: {missing}"


def test_every_operator_has_hostile_arguments():
    names = [name for name in modules.schemas() if name not in modules.LEFT_OUT]
    missing = [name for name in names if name not in ARGUMENTS and name.split(".")[0] not in ARGUMENTS]
    assert not missing, f"operators without an entry in tests/fuzz/hostile_arguments.py: {missing}"


def test_every_public_operator_has_a_schema():
    names = {name.split(".")[0] for name in modules.schemas()}
    public = [name for name in quantrain.__all__ if callable(getattr(quantrain, name)) and name in names]
    assert len(public) > 30


@pytest.mark.parametrize("fault", known.FAULTS, ids=lambda f: f"{f.name}-{f.tag}".replace(" ", "_"))
def test_known_faults_stand(fault):
    if fault.device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    assert fault.stands(), f"mended: take {fault.name!r}, {fault.tag!r} ({fault.reason}) out of tests/fuzz/known.py"


@pytest.mark.parametrize("name", known.CRASHES)
def test_known_crashes_stand(name):
    assert known.crash_stands(name), f"mended: take {name!r} out of CRASHES in tests/fuzz/known.py"


def test_a_case_is_a_function_of_its_numbers():
    first, second = (draw.Draw("fake_quantize", 3, 7) for _ in range(2))
    a, b = (d.tensor(d.shape(), d.dtype()) for d in (first, second))
    assert a.stride() == b.stride() and torch.equal(a.nan_to_num(), b.nan_to_num())
    assert draw.Draw("fake_quantize", 3, 8).getrandbits(64) != draw.Draw("fake_quantize", 3, 7).getrandbits(64)


def test_a_wrong_result_is_found_and_its_line_repeats_it():
    """A fault put into an operator's result: the run fails and prints a command that shows the same fault."""
    program = """
import sys
sys.argv = ["run.py", "--op", "_min_max", "--cases", "50", "--seed", "4"]
sys.path.insert(0, {folder!r})
import run, modules, drawn_fake_quant_ranges
class Wrong:
    def __getattr__(self, name):
        import torch
        return lambda x, shape: tuple(t + 1 for t in torch.ops.quantrain._min_max(x, shape))
drawn_fake_quant_ranges.ops = Wrong()
sys.exit(run.main(sys.argv[1:]))
"""
    code = program.format(folder=str(RUN.parent))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 1
    assert "FAILED _min_max: _min_max's min on cpu" in result.stdout
    assert "| python tests/fuzz/run.py --op _min_max --seed 4 --case 0" in result.stdout


def test_a_crash_is_found_and_the_rest_goes_on():
    program = """
import sys
sys.path.insert(0, {folder!r})
import os, run, draw, modules
modules.load()
def crash(d):
    if d.chance(0.5):
        os.kill(os.getpid(), 11)
draw.DRAWN["crash"] = (crash, ("crash",))
sys.exit(run.main(["--op", "crash", "--op", "_min_max", "--cases", "40", "--seed", "4"]))
"""
    code = program.format(folder=str(RUN.parent))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 1
    assert (
        "FAILED crash: the process died of SIGSEGV | python tests/fuzz/run.py --op crash --seed 4 --case"
        in result.stdout
    )
    assert "_min_max" in result.stdout and "fuzz: 40 cases of 2 tests" in result.stdout
