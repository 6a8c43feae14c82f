"""Several processes: they compute what one computes, and stop together."""

import contextlib
import json
import multiprocessing
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist

import kit.run
import sample
import train
from data.batches import padded
from data.corpus import document_batches
from experiments.machine.kill import log_without_times, outcome
from kit import parallel
from kit.evaluate import answer_problems
from kit.run import ROOT
from model import load_tensors
from tests.small import SHAPE_FLAGS, SMALL, Unsaved, by_length, small_model

# Processes are forked from a server that has imported all this once.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.small", "experiments.machine.kill"])


def begin_process(rank, size, port, folder, work):
    """Run `work` as torchrun would, its output and its result in files of the folder."""
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    here |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update({name: str(x) for name, x in here.items()})
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT), stream)
    torch.set_num_threads(1)
    result = work()
    (folder / f"{rank}.result").write_bytes(pickle.dumps(result))


def start(size, folder, work):
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        CONTEXT.Process(target=begin_process, args=(rank, size, port, folder, work))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    return processes


def end(processes, folder):
    """The exit codes, and what all processes wrote to stdout and stderr."""
    for process in processes:
        process.join(120)
        if process.is_alive():
            process.kill()
            pytest.fail("a process is left")
    said = (
        "".join(path.read_text() for path in sorted(folder.glob(f"*.{name}")))
        for name in ("out", "err")
    )
    return [process.exitcode for process in processes], *said


def results(size, folder, work):
    """What `work` returns in each of several processes."""
    codes, _, said = end(start(size, folder, work), folder)
    assert codes == [0] * size, said
    return [pickle.loads((folder / f"{rank}.result").read_bytes()) for rank in range(size)]


# -------------------------------------------------------------------- they compute what one does


def said(look):
    return [each["tokens"] for asked in look["problems"] for each in asked["completions"]]


def gradients():
    """Of a rollout's rows, with a reference and without, in float64; and what is sampled."""
    parallel.start("cpu")
    found, model, reference = {}, small_model().double(), small_model(9).double()
    _, rollout = train.sample(SMALL, model, 1)
    found["tokens"] = rollout.tokens.numpy()
    rollout.mask &= rollout.mask.cumsum(dim=1) <= torch.arange(16)[:, None] % 11 + 1  # ragged
    rollout.logps = rollout.logps.double().masked_fill(~rollout.mask, 0.0)
    advantages = torch.arange(16.0) % 4 - 1.5
    advantages[4:8] = 0.0
    for variant, beta in (("grpo", 0.0), ("grpo", 0.1), ("dapo", 0.0)):
        config = replace(SMALL, variant=variant, beta=beta)
        train.make_optimizer(model)
        inputs, teaches = train.loss_inputs(
            config, model, reference if beta else None, rollout, advantages
        )
        rows = np.array([15, 2, 3, 5, 7, 11, 0, 6, 9])
        sums = train.add_gradient(config, model, rollout, inputs, rows, teaches)
        gradient = torch.cat([weight.grad.flatten() for weight in model.parameters()])
        found[f"{variant} {beta}"] = gradient.numpy()
        found[f"{variant} {beta} sums"] = np.array([sums[name] for name in sorted(sums)])
    return found


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_processes_give_the_gradient_of_one(size, tmp_path):
    """In float64, and the same bits in each process; what is sampled is the same."""
    one = gradients()
    assert all(np.abs(one[f"{name} 0.0"]).max() > 0.01 for name in ("grpo", "dapo"))
    first, *others = results(size, tmp_path / "run", gradients)
    for name, expected in one.items():
        # The sampler's log-probabilities are float32, and so are sums of metrics.
        close = {"rtol": 1e-5, "atol": 1e-6} if "sums" in name else {"rtol": 0, "atol": 1e-8}
        np.testing.assert_allclose(first[name], expected, **close, err_msg=name)
        for other in others:
            assert (other[name] == first[name]).all(), name


def learning():
    """Imitation, GRPO and answers: the lines of the log, weights, answers, looks; and how many rows
    this process sampled."""
    parallel.start("cpu")
    sampled, honest = [], sample.generate

    def generate_and_count(*args, **how):
        rollout = honest(*args, **how)
        sampled.append(len(rollout.tokens))
        return rollout

    sample.generate = generate_and_count
    model, run = small_model(), Unsaved()
    web = document_batches("chains", SMALL.levels, 0, 320, SMALL.max_seq_len)
    train.imitate(SMALL, run, "base", model, web, 3, 1e-3)
    config = replace(SMALL, steps=3, minibatches=3, inner_epochs=2, beta=0.02)
    train.grpo(config, run, "r1_zero", model, small_model(), by_length)
    problems = train.held_out_problems("chains", [2, 3], 5, 0, "any")
    answers = answer_problems(model, problems, 3, limit=9, seed=5)
    weights = torch.cat([weight.flatten() for weight in model.parameters()])
    sample.generate = honest
    return run.records, weights.detach().numpy(), answers, run.looks, sum(sampled)


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_processes_learn_what_one_learns(size, tmp_path):
    """Pretraining, GRPO with a reference, looks and answers, up to rounding: each number of the log
    is the same."""
    records, weights, answers, looks, sampled = learning()
    rollouts, looked = 3 * SMALL.prompts * SMALL.group_size, 2 * train.LOOKS * SMALL.group_size
    assert sampled == rollouts + looked + 5 * 3  # of rollouts, looks and answers, all are shared
    several = results(size, tmp_path / "run", learning)
    assert sum(found[4] for found in several) == sampled  # no row is sampled twice
    for found in several:
        assert found[2] == answers
        np.testing.assert_allclose(found[1], weights, rtol=0, atol=1e-4)
        for line, expected in zip(found[0], records, strict=True):
            assert line.keys() == expected.keys()
            for name, x in expected.items():
                if name != "stage" and "seconds" not in name:
                    assert line[name] == pytest.approx(x, rel=1e-4, abs=1e-5), name
        assert list(map(said, found[3])) == list(map(said, looks))


def two_rows(step):
    return padded([(1, [3, 4, 5]), (2, [6, 7, 8, 9])], 0)


def few_rows():
    """Two prompts, and batches of two rows: the rollout, and the weights after two steps."""
    parallel.start("cpu")
    model, how = small_model().double(), {"group_size": 2, "max_new_tokens": 6, "eos_id": 0}
    rollout = parallel.generate(model, [[3, 4, 5], [6, 7]], seed=3, first_row=4, **how)
    train.imitate(SMALL, Unsaved(), "base", model, two_rows, 2, 1e-3)
    found = [*vars(rollout).values(), *model.parameters()]
    model.norm.weight.data += parallel.rank()  # as a GPU might round
    parallel.copy_first(model)
    return [x.detach().numpy() for x in (*found, model.norm.weight)]


def test_a_process_without_a_row_has_the_whole_result(tmp_path):
    """Three processes, two prompts, and two rows in a batch. And all can get the first's model."""
    one = few_rows()
    for found in results(3, tmp_path / "run", few_rows):
        for x, expected in zip(found, one, strict=True):
            np.testing.assert_allclose(x, expected, rtol=0, atol=1e-6)


def test_without_torchrun_nothing_of_it_runs(monkeypatch, tmp_path):
    """One process never calls torch.distributed, but to ask whether torchrun is there."""

    def called(*args, **kwargs):
        raise AssertionError("torch.distributed was called")

    names = ("init_process_group", "all_reduce", "broadcast", "all_gather_object", "get_rank")
    for name in (*names, "get_world_size", "destroy_process_group"):
        monkeypatch.setattr(dist, name, called)
    monkeypatch.setenv("WORLD_SIZE", "2")  # another launcher's
    train.main([*FLAGS, "--steps=1", f"--out={tmp_path / 'run'}"])
    assert (tmp_path / "run" / "result.json").exists()


# ----------------------------------------------------------------------------- they stop together

FLAGS = ["--preset=tiny", *SHAPE_FLAGS, "--pretrain_steps=8", "--prompts=4", "--group_size=4"]
FLAGS += ["--max_new_tokens=16", "--minibatches=2", "--eval_problems=8", "--eval_every=50"]
FLAGS += ["--steps=4"]


def job(arguments, save_every=0.0, largest_file=resource.RLIM_INFINITY):
    kit.run.SAVE_EVERY = save_every
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    with contextlib.chdir(ROOT):
        train.main(arguments)


def step_of(folder):
    """The steps of GRPO in the last save."""
    with contextlib.suppress(ValueError, OSError):
        saved = load_tensors(folder / "last.pt")["stopped"]
        return saved["step"] if saved.get("stage") == "r1_zero" else 0
    return 0


def begun(size, tmp_path, steps=1000):
    """A run of several processes that is in its steps of GRPO."""
    run, said = tmp_path / "run", tmp_path / "said"
    work = partial(job, [*FLAGS, f"--steps={steps}", f"--out={run}"])
    processes, until = start(size, said, work), time.monotonic() + 120
    while step_of(run) < 2:
        assert all(process.is_alive() for process in processes) and time.monotonic() < until
        time.sleep(0.05)
    return run, said, processes


@pytest.mark.slow
@pytest.mark.parametrize("signalled", [(0, 1), (1,)], ids=["all", "one"])
def test_a_signal_stops_all_processes_at_one_step(signalled, tmp_path):
    """It saves, says once how to go on, and a run of two goes on with three, and with one."""
    run, said, processes = begun(2, tmp_path)
    for rank in signalled:
        os.kill(processes[rank].pid, signal.SIGINT)
    codes, _, errors = end(processes, said)
    assert codes == [128 + signal.SIGINT] * 2
    step = step_of(run)
    assert len(log_without_times(run)) == 1 + step  # a line of pretraining
    told = [line for line in errors.splitlines() if line]
    assert told[-1].startswith(f"stopped; step {step} of r1_zero is saved. To go on: ")
    assert told[-1].endswith(f"torchrun --nproc_per_node 2 train.py --resume={run}")
    assert len(told) == 1 + (0 in signalled)  # "stopping when this step is done"
    if len(signalled) == 2:
        return
    for size in (3, 1):
        folder = tmp_path / f"on {size}"
        processes = start(size, folder, partial(job, [f"--resume={run}"]))
        while step_of(run) < step + 2:
            time.sleep(0.05)
        step = step_of(run)
        os.kill(processes[0].pid, signal.SIGTERM)
        codes, printed, errors = end(processes, folder)
        assert codes == [128 + signal.SIGTERM] * size, errors
        assert printed.count("bits may differ") == 1
        step = step_of(run)


@pytest.mark.slow
def test_a_run_of_two_goes_on_to_the_same_bits(tmp_path):
    """Left alone or stopped: two processes come to the same files."""
    arguments, folder = [*FLAGS, "--steps=40"], tmp_path / "whole"
    results(2, tmp_path / "said whole", partial(job, [*arguments, f"--out={folder}"], 3600))
    run, said, processes = begun(2, tmp_path, steps=40)
    os.kill(processes[1].pid, signal.SIGTERM)
    assert end(processes, said)[0] == [128 + signal.SIGTERM] * 2
    assert 2 <= step_of(run) < 40
    codes, printed, _ = end(
        start(2, tmp_path / "on", partial(job, [f"--resume={run}"])), tmp_path / "on"
    )
    assert codes == [0, 0] and "bits may differ" not in printed
    assert outcome(run) == outcome(folder)
    assert printed.count("base model:") == 1  # the first process speaks for both


@pytest.mark.parametrize("dead", [0, 1])
def test_a_dead_process_stops_the_others_in_one_line(dead, tmp_path):
    """And nothing but the steps since the last save is lost."""
    run, said, processes = begun(2, tmp_path)
    os.kill(processes[dead].pid, signal.SIGKILL)
    codes, _, errors = end(processes, said)
    assert codes[dead] == -signal.SIGKILL and codes[1 - dead] == 1
    if dead == 1:
        line = "train.py: another process of this run has stopped; step"
        assert errors.startswith(line) and errors.count("\n") == 1
    assert step_of(run) >= 2


def test_a_full_disk_of_the_first_stops_all_in_one_line(tmp_path):
    run, said = tmp_path / "run", tmp_path / "said"
    work = partial(job, [*FLAGS, f"--out={run}"], largest_file=60_000)
    codes, _, errors = end(start(2, said, work), said)
    assert codes == [1, 1]
    assert "cannot be written" in errors and errors.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(["--prompts=0"], "--prompts"), (["--device=meta"], "torchrun"), (["--out=tests"], "exists")],
)
def test_bad_input_is_refused_once(arguments, told, tmp_path):
    """In one line, by the first process alone."""
    said = tmp_path / "said"
    codes, _, errors = end(start(2, said, partial(job, [*FLAGS, *arguments])), said)
    assert codes[0] == 2 and codes[1] in (1, 2)
    assert told in errors and errors.count("\n") == 1


@pytest.mark.slow
def test_torchrun_trains_and_ends(tmp_path):
    """The command of the page: torchrun's own errors are its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "train.py"]
    run = subprocess.run(
        [*command, *FLAGS, f"--out={tmp_path / 'run'}"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("held-out problems") == 1
    assert "r1_zero" in json.loads((tmp_path / "run" / "result.json").read_text())
