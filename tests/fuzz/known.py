"""Faults that are known and not mended yet: a drawn case that meets one does not fail the run.

Each entry shows its fault in `stands`; once the operator is right, test_fuzz.py fails and the entry must go.
"""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Fault:
    name: str  # of a drawn test, or "hostile.<operator>"
    tag: str  # of the case, or a part of the message
    reason: str
    stands: Callable[[], bool]  # whether the operator still has it
    device: str = ""  # "": any


def _no_error_of_ours(code):
    """In a process of its own: whether a call does anything but raise an error in the operator's words."""
    program = f"""
import torch, quantrain
ops = torch.ops.quantrain
torch.set_num_threads(1)
try:
    {code}
except (ValueError, TypeError) as error:
    raise SystemExit(0 if ": expected " in str(error) else 1)
raise SystemExit(1)
"""
    return subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=120).returncode != 0


FAULTS: list[Fault] = []

# Hostile tests that would take other cases down with them, left out: name, reason, calls that show it.
CRASHES: dict[str, tuple[str, str]] = {}


def crash(name):
    """Why a test is left out, or None."""
    return CRASHES[name][0] if name in CRASHES else None


def crash_stands(name):
    return _no_error_of_ours(CRASHES[name][1])


def expected(name, device, tags, message):
    return any(
        fault.name == name and fault.device in ("", device) and (fault.tag in tags or fault.tag in message)
        for fault in FAULTS
    )
