"""The GPU benchmark of DMDR runs at tiny size on the CPU."""

from tests.benchmarks.dmdr_step_time import main


def test_the_benchmark_runs_at_tiny_size():
    result = main(["--model", "tiny", "--device", "cpu", "--batch", "2", "--updates", "2"])
    assert result["seconds_per_update"] > 0
    assert result["tflop_per_update"] > 0
    assert 0 < result["model_flops_utilisation"] < 1
