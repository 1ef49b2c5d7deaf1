"""Killed at random moments and resumed: the same summary to the byte, no recorded call made again.

`benchmarks/evaluation_kills.py` does the same to judging and to generation, as often as wanted.
"""

from __future__ import annotations

import benchmark_kills


def test_judging_survives_kills(tmp_path):
    found = benchmark_kills.judge_kills(10, tmp_path)
    assert found.equal and found.repeated == 0 and found.done == 105
    assert found.hit >= 5
