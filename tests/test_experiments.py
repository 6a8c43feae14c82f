"""The commands of experiments/: what they print is so, and is what the README shows."""

import json
import re
from pathlib import Path

import pytest

from experiments import bench, bias, by_hand, collect, compare, plot

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PNG = b"\x89PNG"


def test_the_worked_example_by_hand_is_what_the_code_computes_and_what_the_readme_shows(capsys):
    by_hand.main()
    shown = capsys.readouterr().out
    assert f"```text\n{shown}```" in README
    losses = re.findall(r"by hand -\((.*)\) / (\d+) = (\S+)\n +policy_loss (\S+)", shown)
    assert len(losses) == 3
    for terms, divisor, total, computed in losses:
        assert total == computed
        assert -eval(terms) / int(divisor) == pytest.approx(float(computed), abs=6e-5)
    advantages = re.findall(r"by hand (\(.*\) / \(.*\)) = +(\S+) +group_advantages +(\S+)", shown)
    assert len(advantages) == 8
    for terms, by_reader, computed in advantages:
        assert by_reader == computed
        assert eval(terms) == pytest.approx(float(computed), abs=2e-4)
    assert float(advantages[0][2]) > 1


def test_the_tables_of_the_bias_are_what_the_readme_shows(capsys, tmp_path):
    bias.main(["--plot", str(tmp_path / "bias.png")])
    shown = capsys.readouterr().out
    for name in ("std", "grpo", "dr_grpo", "dapo", "gspo", "cispo", "reinforce", "rloo", *bias.KL_TERMS):
        (line,) = re.findall(rf"^ *{name} .*\d$", shown, re.MULTILINE)
        assert line in README, line
    assert (tmp_path / "bias.png").read_bytes().startswith(PNG)


def write_run(folder, result=None, **config):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"variant": "grpo", "lr": 0.5, "steps": 30, "out": "x"} | config))
    records = [{"phase": "pretrain", "step": 50, "loss": 2.0}]
    for step in range(1, 21):
        record = {"phase": "grpo", "step": step, "accuracy": step / 20 * config.get("lr", 0.5), "entropy": 1.0}
        record |= dict.fromkeys(("completion_tokens", "no_signal", "grad_norm"), 0.5)
        record |= {"held_out_accuracy": 0.25} if step % 10 == 0 else {}
        record |= {"k3_old": 0.125} if config else {}
        records.append(record)
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if result:
        (folder / "result.json").write_text(json.dumps(result))
    return str(folder)


def test_two_runs_are_compared_by_flags_results_and_logs(capsys, tmp_path):
    base, r1_zero = {"pass@1": 0.25, "beyond": {}}, {"pass@1": 0.5, "beyond": {}}
    one = write_run(tmp_path / "one", {"base": base, "r1_zero": r1_zero})
    two = write_run(tmp_path / "two", {"base": base, "r1_zero": {"pass@1": 0.75}}, lr=1.0, variant="mine")
    compare.main([one, two, "--plot", str(tmp_path / "compare.png")])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["variant", "grpo", "mine"] in lines
    assert ["lr", "0.5", "1", "+0.5"] in lines
    assert ["pass@1", "0.5", "0.75", "+0.25"] in lines
    assert ["accuracy", "0.3875", "0.775", "+0.388"] in lines, "steps 11 to 20"
    assert ["accuracy", "0.2625", "0.525"] in [line[:3] for line in lines], "all steps"
    assert ["k3_old", "-", "0.125"] in lines
    assert not any("out" in line[:1] or "steps" in line[:1] for line in lines), "what is the same is not listed"
    assert (tmp_path / "compare.png").read_bytes().startswith(PNG)
    compare.main([one, two, "--plot", str(tmp_path / "k3.png"), "--curves", "k3_old,held_out_accuracy"])
    assert (tmp_path / "k3.png").read_bytes().startswith(PNG)
    (tmp_path / "two" / "grpo.py").write_text("another loss")
    compare.main([one, two])
    assert f"the code differs too: grpo.py (diff {one}/grpo.py {two}/grpo.py)" in capsys.readouterr().out
    three = write_run(tmp_path / "three")
    compare.main([one, three])
    shown = capsys.readouterr().out
    assert "20 of 30 steps" in shown and "held out" not in shown, "a run that has no result yet"


def test_the_curves_of_runs_are_drawn_from_their_logs(tmp_path, capsys):
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two", lr=1.0)
    young = write_run(tmp_path / "young")
    lines = (tmp_path / "young" / "log.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "young" / "log.jsonl").write_text("".join(lines[:4]))
    plot.main([young])  # before its first look at held-out problems
    plot.main([one])
    assert (tmp_path / "one" / "curves.png").read_bytes().startswith(PNG)
    plot.main([one, two, "--out", str(tmp_path / "two.png"), "--curves", "accuracy,k3_old"])
    assert (tmp_path / "two.png").read_bytes().startswith(PNG)
    plot.main([one, "--phase", "pretrain", "--curves", "loss", "--out", str(tmp_path / "loss.png")])
    assert (tmp_path / "loss.png").read_bytes().startswith(PNG)
    capsys.readouterr()
    for arguments, complaint in (
        ([one, "--curves", "banana"], "no log has a field banana, but accuracy, completion_tokens"),
        ([one, "--phase", "pretrain", "--curves", "accuracy"], "no log has a field accuracy, but loss"),
        ([one, "--out", str(tmp_path / "nowhere" / "x.png")], "there is no folder"),
        ([one, "--out", str(tmp_path)], "a folder, where the name of a picture should be"),
        ([str(tmp_path)], "is not the folder of a run: it holds no log.jsonl"),
    ):
        with pytest.raises(SystemExit) as stop:
            plot.main(arguments)
        printed = capsys.readouterr()
        assert stop.value.code == 2 and printed.out == ""
        assert complaint in printed.err and printed.err.count("\n") == 1


def test_the_benchmark_counts_useful_tokens_and_takes_a_step_apart(tmp_path, monkeypatch, capsys):
    """Without the peers: what is missing is named, and the rest runs."""
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "bench.json")
    monkeypatch.setattr(bench, "find_spec", lambda name: None if name in ("transformers", "trl") else True)
    common = ["--shape", "cpu", "--rows", "32", "--tokens", "12", "--repeat", "2"]
    bench.main(["sample", *common])
    bench.main(["sample", *common, "--ends"])
    bench.main(["step", *common, "--silent", "0.5"])
    shown = capsys.readouterr().out
    assert "transformers is not installed" in shown and "trl is not installed" in shown
    whole, ended, step = (row["result"] for row in json.loads((tmp_path / "bench.json").read_text()))
    assert whole["mean_length"]["ours"] == 12 > ended["mean_length"]["ours"]
    for result in (whole, ended):
        assert result["tokens_per_second"]["ours"] == pytest.approx(sum(result["all"]["ours"]) / 2)
        assert 0 < result["share_of_roofline"] < 1
    seconds = dict(step["seconds"])
    assert seconds.pop("whole") == pytest.approx(sum(seconds.values()), rel=0.2)
    assert set(seconds) == {"sample", "reward", "forward", "backward", "optimizer", "other"}
    assert 0 < step["update_flop_utilisation"] < 1
    assert len(bench.table(json.loads((tmp_path / "bench.json").read_text())).splitlines()) == 2 + 3


def test_the_limit_of_the_sampler_is_its_bytes_and_products_counted_one_by_one(monkeypatch):
    machine = bench.Machine("cpu", bench.torch.float32)
    monkeypatch.setattr(bench.Machine, "flops_per_second", lambda self: 1e9)
    monkeypatch.setattr(bench.Machine, "bytes_per_second", lambda self: 1e9)
    flags = bench.argparse.Namespace(shape="cpu", tokens=5)
    model = bench.our_model(flags, machine)
    weights = sum(w.numel() for name, w in model.named_parameters() if not name.startswith("position"))
    flops, read = 0, 0
    for length in (5, 2):
        for new in range(1, length + 1):
            seen = bench.PROMPT + new
            flops += 2 * weights + 3 * 4 * seen * 64  # 3 layers: scores and values, 4 heads of 16, a product and a sum
            read += 3 * 2 * 2 * 16 * seen * 4  # 3 layers, keys and values, 2 heads of 16 in 4 bytes
    read += 5 * weights * 4  # the weights once a step
    assert bench.seconds_at_best(model, machine, [5, 2]) == pytest.approx((flops + read) / 1e9)


def test_the_readmes_table_of_speed_is_that_of_the_results():
    assert bench.table(json.loads(bench.RESULTS.read_text())) in README


def test_what_is_no_run_is_refused_in_one_line(capsys, tmp_path):
    one = write_run(tmp_path / "one")
    (tmp_path / "empty").mkdir()
    young = Path(write_run(tmp_path / "young"))
    (young / "log.jsonl").write_text("")
    (tmp_path / "torn").mkdir()
    for name in ("config.json", "log.jsonl"):
        (tmp_path / "torn" / name).write_text((tmp_path / "one" / name).read_text())
    with (tmp_path / "torn" / "log.jsonl").open("a") as log:
        log.write('{"phase": "gr')
    compare.main([one, str(tmp_path / "torn")])
    assert "20 of 30 steps" in capsys.readouterr().out, "a line that is still being written is left alone"
    with pytest.raises(SystemExit):
        compare.main([one, one, "--plot", str(tmp_path / "x.png"), "--curves", "accuracy,banana"])
    assert "no log has a field banana, but accuracy, completion_tokens" in capsys.readouterr().err
    for command, arguments in ((compare.main, [one, one]), (bias.main, [])):
        with pytest.raises(SystemExit) as stop:
            command([*arguments, "--plot", str(tmp_path / "nowhere" / "x.png")])
        assert stop.value.code == 2 and "there is no folder" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"holds no result.json"):
        collect.main(["cpu", one])
    for other, complaint in (
        (tmp_path / "nowhere", "holds no config.json"),
        (tmp_path / "empty", "holds no config.json"),
        (young, "has no line of phase grpo in its log yet"),
    ):
        with pytest.raises(SystemExit) as stop:
            compare.main([one, str(other)])
        printed = capsys.readouterr()
        assert stop.value.code == 2 and printed.out == ""
        assert complaint in printed.err and printed.err.count("\n") == 1
