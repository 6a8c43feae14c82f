"""experiments/machine: what the benchmark counts. What a run survives is in test_run.py."""

import json
from argparse import Namespace

import pytest
import torch

from experiments.machine import bench, kill
from tests.small import PROSE


def test_the_benchmark_takes_sampler_and_step_apart(tmp_path, monkeypatch, capsys):
    """Tokens end at the end token, the parts of a step add up, and missing peers are named."""
    missing = ("transformers", "trl")
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "bench.json")
    monkeypatch.setattr(bench, "find_spec", lambda name: None if name in missing else True)
    common = ["--shape", "cpu", "--rows", "32", "--tokens", "12", "--repeat", "2"]
    bench.main(["sample", *common])
    bench.main(["sample", *common, "--ends"])
    bench.main(["sample", *common, "--ends"])  # replaces the result before
    bench.main(["step", *common, "--silent", "0.5"])
    shown = capsys.readouterr().out
    assert all(f"{name} is not installed" in shown for name in missing)
    rows = json.loads((tmp_path / "bench.json").read_text())
    whole, ended, step = (row["result"] for row in rows)
    assert whole["mean_length"]["ours"] == 12 > ended["mean_length"]["ours"]
    for result in (whole, ended):
        mean = sum(result["all"]["ours"]) / 2
        assert result["tokens_per_second"]["ours"] == pytest.approx(mean)
        assert 0 < result["share_of_roofline"] < 1
    for turn in step["all"]["ours"]:
        seconds = dict(turn)
        assert seconds.pop("whole") == pytest.approx(sum(seconds.values()))
        assert set(seconds) == {"sample", "reward", "update", "optimizer"}
    assert 0 < step["update_flop_utilisation"] < 1
    assert len(bench.table(rows).splitlines()) == 2 + 3


def test_a_step_trains_on_the_groups_with_signal_alone():
    """A step changes the weights, and groups of equal rewards do not go through the model."""
    machine = bench.Machine("cpu", torch.float32)
    flags = Namespace(shape="cpu", rows=32, tokens=6, micro_batch=8, silent=0.5)
    step = bench.OurStep(flags, machine, bench.random_prompts(flags))
    before = [weight.clone() for weight in step.model.parameters()]
    step()
    rows = 16 * bench.PROMPT  # of one group of two
    assert rows < step.trained <= rows + 16 * 6 < rows + step.tokens
    assert any((new != old).any() for new, old in zip(step.model.parameters(), before))


def test_the_samplers_limit_is_its_bytes_and_products(monkeypatch):
    """`seconds_at_best` equals a count token by token, at rates of 1e9."""
    machine = bench.Machine("cpu", torch.float32)
    monkeypatch.setattr(bench.Machine, "flops_per_second", lambda self: 1e9)
    monkeypatch.setattr(bench.Machine, "bytes_per_second", lambda self: 1e9)
    model = bench.our_model(Namespace(shape="cpu", tokens=5), machine)
    weights = sum(weight.numel() for weight in model.parameters())
    flops, read = 0, 0
    for length in (5, 2):
        for new in range(1, length + 1):
            seen = bench.PROMPT + new
            # 3 layers: scores and values, 4 heads of 16, a product and a sum
            flops += 2 * weights + 3 * 4 * seen * 64
            read += 3 * 2 * 2 * 16 * seen * 4  # keys and values, 2 heads of 16 in 4 bytes
    read += 5 * weights * 4  # the weights once a step
    found = bench.seconds_at_best(model, machine, [5, 2])
    assert found == pytest.approx((flops + read) / 1e9)


@pytest.mark.docs
def test_the_readmes_table_of_speed_is_of_the_results():
    """A page's table is made from experiments/results/bench.json."""
    assert bench.table(json.loads(bench.RESULTS.read_text())) in PROSE


@pytest.mark.parametrize("kills", ["0", "-1"])
def test_fewer_than_one_kill_is_refused(kills, capsys):
    """In one line, before any run begins."""
    with pytest.raises(SystemExit) as stop:
        kill.main([f"--kills={kills}"])
    printed = capsys.readouterr()
    assert stop.value.code == 2 and printed.out == ""
    assert "--kills must be at least 1" in printed.err and printed.err.count("\n") == 1
