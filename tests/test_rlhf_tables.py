"""The search of settings and the tables of the chapter on RLHF, on numbers that are known."""

import json
from dataclasses import replace

import pytest

from experiments.study import rlhf_search, rlhf_tables
from experiments.study.collect import RESULTS
from experiments.study.rlhf_search import TRIED, chosen, settings_of
from kit.run import open_run
from rlhf import dpo, measure
from rlhf.compare import nearest
from rlhf.methods import METHODS
from tests.small import SHAPE


def at(step, kl, gold, proxy=0.5):
    told = {"kl": kl, "gold": gold, "proxy": proxy, "tokens": 9.0}
    said = [{"prompt": "User: say hello to me\nAssistant:", "said": f" {kl}", **told}]
    return {"step": step, **told, "said": said}


def tried(*points, **settings):
    return {"settings": settings, "points": [at(0, 0.0, 9.0), *points]}


def test_the_setting_with_most_gold_at_the_kl_is_chosen():
    """At the point that is nearest, though gold is higher elsewhere; none that is too far."""
    first = tried(at(1, 1.0, 5.0), at(2, 2.1, 1.0), lr=1)
    second = tried(at(1, 1.9, 2.0), at(2, 5.0, 0.0), lr=2)
    far = tried(at(1, 1.7, 8.0), lr=3)
    best = chosen([first, second, far], 2.0)
    assert best["settings"] == {"lr": 2} and best["step"] == 1
    assert chosen([first, far], 2.0)["settings"] == {"lr": 1}
    assert chosen([far], 2.0) is None


def test_each_method_has_as_many_settings():
    found = {name: settings_of(name) for name in METHODS}
    assert {len(each) for each in found.values()} == {3}
    for name, each in found.items():
        for settings in each:
            assert replace(rlhf_search.Config(), **settings, searched=name).searched == name


def test_a_search_walks_a_path_for_each_setting(tmp_path, monkeypatch, capsys):
    """Each setting has its own stage, and is the one that is used there."""
    monkeypatch.setattr(measure, "ASKED", 2)
    monkeypatch.setattr(dpo, "CHOOSING", 20)
    knobs, _ = TRIED["grpo"]
    monkeypatch.setitem(TRIED, "grpo", (knobs, [(1e-3, 0.5), (1e-2, 0.5)]))
    how = {"preset": "tiny", "pretrain_steps": 2, "max_new_tokens": 5, "max_level": 2, "steps": 2}
    how |= {"curated": 20, "sft_steps": 2, "pairs": 60, "min_lead": 0.3, "reward_batch": 8}
    how |= {"prompts": 2, "group_size": 2, "searched": "grpo", "out": str(tmp_path / "run")}
    config = rlhf_search.Config(**how | SHAPE).filled()
    with open_run(config, "-m experiments.study.rlhf_search") as run:
        rlhf_search.search(config, run)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    one, other = result["grpo"]
    assert one["settings"] == {"lr": 1e-3, "beta": 0.5} and other["settings"]["lr"] == 1e-2
    assert [x["step"] for x in one["points"]] == [x["step"] for x in other["points"]] == [0, 1, 2]
    kls = [x["points"][-1]["kl"] for x in (one, other)]
    assert abs(kls[1]) > abs(kls[0])
    assert "lr 0.01, beta 0.5" in capsys.readouterr().out


# ------------------------------------------------------------------------------------ publication


def path_of(seed, last):
    points = [at(0, 0.0, 0.0), at(1, 0.4, 7.0), at(3, 2.0, 1.0 + seed)]
    points.append(at(6, last, -4.0, proxy=1.5))
    return {"points": points, "seconds": 7.0 if seed else None}


def run_folder(folder, program, result, **settings):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"program": f"-m {program}", **settings}))
    (folder / "result.json").write_text(json.dumps(result))
    return folder


@pytest.fixture
def folders(tmp_path):
    """Two judges, two comparisons, and a search of three methods."""
    judges, compared, searched = [], [], []
    for seed in (1, 0):
        shares = {"pairs": 9, "gold": 0.9, "reward": 0.7 + seed / 10, "random": 0.6, "length": 0.5}
        split = {"gold": 0.5 + seed, "facts": 1.0, "mistakes": -0.5}
        model = {"seen": split, "held_out": split, "chains": 0.25}
        result = {"seed": seed, "base": model, "sft": model, "agreement": {"new, all": shares}}
        how = {"seed": seed, "out": str(seed), "init": "", "pairs": 100, "nats": 1.9}
        judges.append(run_folder(tmp_path / f"j{seed}", "rlhf.reward_model", result, **how))
        paths = {stage: path_of(seed, 9.0) for stage in rlhf_tables.PUSHED if stage != "best_of_n"}
        picks = [at(0, 0.0, 0.0) | {"n": 1}, at(0, 1.8, 2.0) | {"n": 16}]
        result = {"seed": seed, "sft": model, "best_of_n": {"points": picks}, **paths}
        picked = {"n": 16, "kl": 1.8, "held_out": split, "seen": split}
        result["best_of_n_close"] = picked
        result["costs"] = {"dpo": {"models": 2, "trained": 1, "bytes": 3_000_000}}
        for stage in METHODS:
            far = 3.0 if (stage, seed) == ("dpo", 1) else 2.0
            result[f"{stage}_close"] = {"step": 3, "kl": far, **model}
        how |= {"steps": 2, "prompts": 3, "group_size": 4}
        compared.append(run_folder(tmp_path / f"c{seed}", "rlhf.compare", result, **how))
    for name in METHODS:
        each = [tried(at(3, 1.9, 2.0), lr=1.0), tried(at(3, 1.9, 4.0), lr=2.0)]
        how = {"seed": 7, "searched": name, "nats": 1.9}
        program = "experiments.study.rlhf_search"
        searched.append(run_folder(tmp_path / name, program, {"seed": 7, name: each}, **how))
    return judges, compared, searched


def results_of(judges, compared, searched):
    found = {"judged": rlhf_tables.judged(judges), "compared": rlhf_tables.compared(compared)}
    found["searched"] = rlhf_tables.searched(searched)
    return found | {"hardware": "a machine", "torch": "2"}


def test_the_tables_tell_the_numbers_of_the_runs(folders):
    results = results_of(*folders)
    tables = {name: table(results) for name, (_, table) in rlhf_tables.TABLES.items()}
    assert "Seeds 0, 1," in tables["judges"] and "Seeds 0, 1," in tables["one KL"]
    assert "| new, all pairs | 90.0 % (90.0-90.0) | 75.0 % (70.0-80.0) |" in tables["judges"]
    assert "| DPO | 2.50 (2.00 to 3.00) | 1.00 (0.50 to 1.50) |" in tables["one KL"]
    assert "| best of 16 | 1.80 (1.80 to 1.80) | 1.00 (0.50 to 1.50) |" in tables["one KL"]
    assert "Not within 10 % of the KL: DPO (seed 1, 3.00 nats)." in tables["one KL"]
    row = "1.50 (1.00 to 2.00) | 2.00 (2.00 to 2.00) | -4.00 (-4.00 to -4.00) | 1.50 (1.50 to 1.50)"
    assert f"| GRPO, no KL | {row} |" in tables["over-optimised"]
    assert "| GRPO | `lr` 2 | 3 | 1.90 | 0.50 | 4.00 | chosen |" in tables["searched"]
    assert "| DPO | 2 | 1 | 3.0 | 0 | 600 | 7.00 |" in tables["costs"]
    shown = tables["hacked samples"]
    assert "User: say hello to me\nAssistant: 9.0\n" in shown and "judge 1.50, gold -4.0" in shown


def test_runs_that_do_not_belong_together_are_refused(folders, tmp_path):
    judges, compared, searched = folders
    with pytest.raises(ValueError, match=r"was not made by python -m rlhf\.compare"):
        rlhf_tables.compared(judges)
    with pytest.raises(ValueError, match=r"holds no result\.json"):
        rlhf_tables.judged([tmp_path])
    settings = json.loads((compared[1] / "config.json").read_text())
    (compared[1] / "config.json").write_text(json.dumps(settings | {"nats": 1.0}))
    with pytest.raises(ValueError, match=r"c0 differs from .*c1 in nats$"):
        rlhf_tables.compared(compared)
    settings = json.loads((searched[1] / "config.json").read_text())
    (searched[1] / "config.json").write_text(json.dumps(settings | {"seed": 8}))
    with pytest.raises(ValueError, match=r"a search of seed \d beside one of"):
        rlhf_tables.searched(searched)


# ----------------------------------------------------------------------------------- the results


def results_of_the_chapter():
    return json.loads((RESULTS / "rlhf.json").read_text())


@pytest.mark.docs
@pytest.mark.parametrize("name", rlhf_tables.TABLES)
def test_the_tables_of_the_page_are_those_of_the_results(name):
    comment, (part, table) = f"<!-- {rlhf_tables.comment(name)} -->\n", rlhf_tables.TABLES[name]
    results, page = results_of_the_chapter(), rlhf_tables.PAGE.read_text()
    assert (comment in page) == (part in results)
    if part in results:
        block = page.partition(comment)[2].partition("\n<!-- end -->")[0]
        assert block == table(results)


def test_without_a_kl_the_judges_score_rises_and_gold_falls():
    """In every seed: at the end of the path gold is below its start, the score far above."""
    seeds = results_of_the_chapter()["compared"]["seeds"]
    assert len(seeds) >= 3
    for seed in seeds:
        first, *_, last = seed["grpo_free"]
        assert last["gold"] < first["gold"] and last["proxy"] > first["proxy"] + 0.8


def test_what_the_page_says_of_the_methods_holds_in_every_seed():
    """All gain on both splits, PPO more than GRPO on held-out numbers; best-of-n most on seen
    ones; a KL pays at one KL, and chains stay."""
    compared = results_of_the_chapter()["compared"]
    for seed in compared["seeds"]:
        gold = {
            split: {
                name.removesuffix("_close"): model[split]["gold"]
                for name, model in seed.items()
                if name.endswith("_close") or name == "sft"
            }
            for split in ("held_out", "seen")
        }
        for golds in gold.values():
            assert golds["sft"] == min(golds.values())
        assert gold["held_out"]["ppo"] > gold["held_out"]["grpo"]
        assert gold["seen"]["best_of_n"] == max(gold["seen"].values())
        with_kl, free = (
            nearest(seed[stage], compared["nats"])["gold"] for stage in ("grpo", "grpo_free")
        )
        assert with_kl > free > seed["grpo_free"][0]["gold"]
        assert 2 < seed["grpo"][-1]["kl"] < 3
        chains = [seed[f"{method}_close"]["chains"] for method in METHODS]
        assert chains == pytest.approx([seed["sft"]["chains"]] * 3, abs=0.03)


def test_what_the_search_chose_is_the_default():
    searched = results_of_the_chapter()["searched"]
    for name in METHODS:
        best = chosen(searched[name], searched["nats"])
        for knob, value in best["settings"].items():
            assert getattr(rlhf_search.Config(), knob) == value, knob
