"""Objectives and searches on real, tiny Transformers models."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as Fast

from optimer_engine.cli.search import command, table
from optimer_engine.engine import extract, merge
from optimer_engine.errors import OptimerError, RecipeError
from optimer_engine.recipe import Recipe
from optimer_engine.search import (
    CorpusObjective,
    SearchConfig,
    Term,
    Vector,
    bits_per_byte,
    merge_trial,
    run_search,
    searched_in,
)
from optimer_engine.search.page import write_page
from optimer_engine.search.tasks import TaskObjective

TEXTS = {
    "ja": "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。",
    "math": "one plus two is three. two plus two is four. naïve \U0001f600 sums.",
}


@pytest.fixture(scope="module")
def tokenizer() -> Fast:
    """Byte-level BPE, so that one character may be several tokens."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXTS.values(), trainer)
    return Fast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def tiny_llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=320,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
        )
    ).eval()


@pytest.fixture(scope="module")
def pool(tokenizer: Fast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a vector and a full checkpoint trained a little on one text each, and the texts."""
    root = tmp_path_factory.mktemp("pool")
    base = tiny_llama(0)
    base.save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    for name, text in TEXTS.items():
        (root / f"{name}.txt").write_text(text * 3, encoding="utf-8")
        model = AutoModelForCausalLM.from_pretrained(root / "base").train()
        optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"][:60]])
        for _ in range(5):
            optimiser.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimiser.step()
        model.save_pretrained(root / f"full-{name}")
    extract(root / "base", root / "full-ja", root / "ja")
    return root


def searched(pool: Path, **more: object) -> SearchConfig:
    settings: dict[str, object] = {
        "base": str(pool / "base"),
        "vectors": [Vector("ja", str(pool / "ja")), Vector("math", str(pool / "full-math"))],
        "objective": [Term(n, corpus=str(pool / f"{n}.txt")) for n in TEXTS],
        "trials": 9,
        "block_length": 16,
        **more,
    }
    return SearchConfig(**settings)  # type: ignore[arg-type]


# bits per byte ------------------------------------------------------------------------------------


def bits_by_hand(model: LlamaForCausalLM, ids: list[int], block_length: int) -> float:
    """In fp64, token by token, with the softmax written out; EOS (1) is context only."""
    exact = LlamaForCausalLM(model.config).double().eval()
    exact.load_state_dict(model.state_dict())
    total = 0.0
    for start in range(0, len(ids), block_length - 1):
        block = [0, *ids[start : start + block_length - 1]]
        with torch.no_grad():
            logits = exact(input_ids=torch.tensor([block])).logits[0]
        for position, token in enumerate(block[1:]):
            row = logits[position]
            total += float(torch.logsumexp(row, 0) - row[token]) if token != 1 else 0.0
    return total / math.log(2)


@pytest.mark.parametrize("block_length", [5, 16, 64])
def test_bits_per_byte_equals_a_computation_by_hand(
    tokenizer: Fast, tmp_path: Path, block_length: int
) -> None:
    model = tiny_llama(1)
    for name, text in TEXTS.items():
        path = tmp_path / f"{name}.txt"
        path.write_text(text, encoding="utf-8")
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        expected = bits_by_hand(model, ids, block_length) / len(text.encode())
        found = bits_per_byte(model, tokenizer, path, block_length=block_length, batch_size=3)
        assert found == pytest.approx(expected, rel=1e-5)


def test_documents_are_joined_by_eos_which_is_not_scored(tokenizer: Fast, tmp_path: Path) -> None:
    model = tiny_llama(1)
    path = tmp_path / "two.jsonl"
    rows = [{"text": TEXTS["math"]}, {"text": ""}, {"text": TEXTS["ja"], "id": 7}]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    score = CorpusObjective({"two": path}, tokenizer, block_length=8)(model)["two"]
    assert sum(score.sizes) == sum(len(text.encode()) for text in TEXTS.values())
    ja, sums = (tokenizer(TEXTS[n], add_special_tokens=False)["input_ids"] for n in TEXTS)
    stream = [*sums, 1, *ja]
    assert len(score.parts) == math.ceil(len(stream) / 7)
    expected = bits_by_hand(model, stream, 8) / sum(score.sizes)
    assert score.value == pytest.approx(expected, rel=1e-5)
    assert score.value == pytest.approx(sum(score.parts) / sum(score.sizes), rel=1e-6)
    limited = CorpusObjective({"two": path}, tokenizer, block_length=8, limits={"two": 3})(model)
    assert limited["two"].parts == score.parts[:3]


def test_parts_do_not_depend_on_batching(tokenizer: Fast, tmp_path: Path) -> None:
    model = tiny_llama(1).train()
    path = tmp_path / "ja.txt"
    path.write_text(TEXTS["ja"] * 4, encoding="utf-8")
    scores = [
        CorpusObjective({"ja": path}, tokenizer, block_length=12, batch_size=b)(model)["ja"]
        for b in (1, 5, 64)
    ]
    np.testing.assert_allclose(scores[0].parts, scores[1].parts, rtol=1e-5)
    np.testing.assert_allclose(scores[0].parts, scores[2].parts, rtol=1e-5)
    assert scores[0].sizes == scores[2].sizes
    assert model.training  # left as it was found


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.txt", None, "no such file"),
        ("empty.txt", b"", "holds no text"),
        ("latin.txt", b"na\xefve", "UTF-8"),
        ("rows.jsonl", b'{"text": "a"}\n{"body": "b"}\n', "line 2"),
        ("rows.jsonl", b'{"text": "a"}\n["b"]\n', "line 2"),
    ],
)
def test_unusable_texts_are_refused_by_name(
    tokenizer: Fast, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(RecipeError, match=message) as caught:
        CorpusObjective({"x": tmp_path / name}, tokenizer, block_length=8)
    assert name in str(caught.value)


# lm-eval ------------------------------------------------------------------------------------------

TASK = """
task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
num_fewshot: 0
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
ROLLING = """
task: rolling
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
"""


@pytest.fixture
def tasks_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [
        {"question": f"{n} plus {n} is", "choices": [" four", " two", " 猫"], "answer": n % 3}
        for n in range(10)
    ]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, text in (("colours", TASK), ("rolling", ROLLING)):
        (folder / f"{name}.yaml").write_text(text.replace("DATA", str(folder / "data.jsonl")))
    return folder


def by_hand_accuracy(model: LlamaForCausalLM, tokenizer: Fast, rows: list[dict]) -> list[float]:
    right = []
    for row in rows:
        scores = []
        for choice in row["choices"]:
            context = tokenizer(row["question"], add_special_tokens=False)["input_ids"]
            whole = tokenizer(row["question"] + choice, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logp = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            picked = range(len(context), len(whole))
            scores.append(sum(float(logp[i - 1, whole[i]]) for i in picked))
        right.append(float(int(np.argmax(scores)) == row["answer"]))
    return right


def test_lm_eval_scores_local_tasks_and_follows_the_live_weights(
    tokenizer: Fast, tasks_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    where = str(tasks_dir)
    environment = dict(os.environ)
    objective = TaskObjective(
        [
            Term("acc", task="colours", metric="acc", tasks_dir=where, limit=8),
            Term("norm", task="colours", metric="acc_norm", tasks_dir=where, limit=8),
            Term("bpb", task="rolling", metric="bits_per_byte", tasks_dir=where),
        ],
        tokenizer,
    )
    model = tiny_llama(1)
    scores = objective(model)
    rows = [json.loads(line) for line in (tasks_dir / "data.jsonl").read_text().splitlines()]
    assert scores["acc"].parts == by_hand_accuracy(model, tokenizer, rows[:8])
    assert scores["acc"].higher_is_better and not scores["bpb"].higher_is_better
    assert len(scores["norm"].parts) == 8
    bpb = scores["bpb"]
    assert bpb.value == pytest.approx(sum(bpb.parts) / sum(bpb.sizes), rel=1e-6)
    assert sum(bpb.sizes) == sum(len(row["question"].encode()) for row in rows)
    assert objective(model) == scores
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    assert objective(model)["bpb"].value != bpb.value
    assert dict(os.environ) == environment
    out, err = capfd.readouterr()
    assert out == "" and err == ""
    assert logging.getLogger("lm_eval").level == logging.NOTSET


def test_prompts_and_tokens_are_made_once_and_shots_stay(
    tokenizer: Fast, tasks_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An example has one prompt, whatever was asked before, and lm-eval's own for all of them."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    text = (tasks_dir / "colours.yaml").read_text()
    shots = text.replace("num_fewshot: 0", "num_fewshot: 2\nfewshot_split: test")
    (tasks_dir / "colours.yaml").write_text(shots)
    term = Term("acc", task="colours", metric="acc", tasks_dir=str(tasks_dir))
    objective, model = TaskObjective([term], tokenizer), tiny_llama(1)
    whole = objective(model)["acc"].parts
    few = [objective(model, {"acc": [2, 5, 7]})["acc"].parts for _ in range(2)]
    assert few == [[whole[i] for i in (2, 5, 7)]] * 2
    prompts: list[str] = []
    encode = HFLM.tok_encode
    monkeypatch.setattr(
        HFLM, "tok_encode", lambda self, s, *a, **k: prompts.append(s) or encode(self, s, *a, **k)
    )
    assert objective(model)["acc"].parts == whole and prompts == []
    theirs = simple_evaluate(
        model=HFLM(pretrained=tiny_llama(1), tokenizer=tokenizer, batch_size=1),
        tasks=["colours"],
        task_manager=TaskManager(include_path=str(tasks_dir), include_defaults=False),
        bootstrap_iters=0,
    )
    assert [row["acc"] for row in theirs["samples"]["colours"]] == whole
    asked = [i.arguments[0] for i in objective._loaded["tasks"]["colours"].instances]
    assert [row["arguments"][0][0] for row in theirs["samples"]["colours"]] == asked[::3]


def test_task_files_with_code_are_refused_unless_allowed(tokenizer: Fast, tasks_dir: Path) -> None:
    proof = tasks_dir / "ran"
    (tasks_dir / "code.py").write_text(
        f"from pathlib import Path\nPath({str(proof)!r}).touch()\ndef f(docs): return docs\n"
    )
    (tasks_dir.parent / "hidden.yaml").write_text("process_docs: !function tasks.code.f\n")
    term = Term("acc", task="colours", metric="acc", tasks_dir=str(tasks_dir))
    task = tasks_dir / "colours.yaml"
    plain = task.read_text()
    for line in ("process_docs: !function code.f", "include: ../hidden.yaml", "class: code.Task"):
        task.write_text(plain + line + "\n")
        with pytest.raises(RecipeError, match=r"allow_task_code"):
            TaskObjective([term], tokenizer)
        assert not proof.exists()
    task.write_text(plain + "process_docs: !function code.f\n")
    TaskObjective([term], tokenizer, allow_task_code=True)
    assert proof.exists()


def test_tasks_that_run_what_the_model_writes_are_refused_unless_allowed(
    tokenizer: Fast, tasks_dir: Path
) -> None:
    term = Term("acc", task="colours", metric="acc", tasks_dir=str(tasks_dir))
    task = tasks_dir / "colours.yaml"
    task.write_text(task.read_text() + "unsafe_code: true\n")
    with pytest.raises(RecipeError, match="task 'colours': runs the code that the model writes"):
        TaskObjective([term], tokenizer)
    allowed = TaskObjective([term], tokenizer, allow_task_code=True)
    assert 0 <= allowed(tiny_llama(1))["acc"].value <= 1


def test_unknown_tasks_and_metrics_are_refused(tokenizer: Fast, tasks_dir: Path) -> None:
    where = str(tasks_dir)
    with pytest.raises(RecipeError, match="no task 'colors'; found colours, rolling"):
        TaskObjective([Term("a", task="colors", metric="acc", tasks_dir=where)], tokenizer)
    with pytest.raises(RecipeError, match="no such folder"):
        TaskObjective([Term("a", task="colours", metric="acc", tasks_dir="nowhere")], tokenizer)
    wrong = TaskObjective([Term("a", task="colours", metric="f1", tasks_dir=where)], tokenizer)
    with pytest.raises(RecipeError, match=r"no metric 'f1'; it has acc,none, acc_norm,none"):
        wrong(tiny_llama(1))
    two = [
        Term("a", task="colours", metric="acc", tasks_dir=where, limit=2),
        Term("b", task="colours", metric="acc_norm", tasks_dir=where, limit=3),
    ]
    with pytest.raises(RecipeError, match="other limit"):
        TaskObjective(two, tokenizer)


# the whole loop -----------------------------------------------------------------------------------


def test_search_merges_the_winner_and_what_was_scored_is_what_was_written(
    pool: Path, tokenizer: Fast, tmp_path: Path
) -> None:
    report = run_search(searched(pool), tmp_path / "run")
    rows = {row.name: row for row in report.table}
    best = rows["best"]
    assert best.cost < 0.0 == rows["base"].cost
    assert all(best.cost <= row.cost for row in report.table)
    assert report.seconds["evaluate"] > 0 and report.seconds["merge"] > 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "best").eval()
    objective = CorpusObjective({n: pool / f"{n}.txt" for n in TEXTS}, tokenizer, block_length=16)
    again = objective(merged)
    assert {name: score.value for name, score in again.items()} == best.scores
    assert sum(best.weights.values()) == pytest.approx(report.sum_of_weights)
    assert sum(report.ratios.values()) == pytest.approx(1.0)
    assert (tmp_path / "run" / "best.yaml").read_text().startswith("base:")
    alone = AutoModelForCausalLM.from_pretrained(pool / "full-ja").eval()
    assert objective(alone)["ja"].value == pytest.approx(rows["only ja"].scores["ja"], rel=1e-5)


def test_resuming_keeps_the_winner_and_growing_may_replace_it(pool: Path, tmp_path: Path) -> None:
    first = run_search(searched(pool, trials=4), tmp_path)
    stamp = (tmp_path / "best" / "model.safetensors").stat().st_mtime_ns
    assert run_search(searched(pool, trials=4), tmp_path).best_weights == first.best_weights
    assert (tmp_path / "best" / "model.safetensors").stat().st_mtime_ns == stamp
    grown = run_search(searched(pool, trials=9), tmp_path)
    assert grown.best_cost <= first.best_cost
    assert (tmp_path / "best" / "model.safetensors").exists()


def test_any_callable_can_be_the_objective(pool: Path, tmp_path: Path) -> None:
    def norm(model: torch.nn.Module) -> float:
        return float(model.model.norm.weight.detach().square().sum())

    report = run_search(searched(pool, objective=[], trials=5), tmp_path, objective=norm)
    assert report.table[0].scores.keys() == {"value"}


def test_a_second_objective_reuses_the_trials(pool: Path, tmp_path: Path) -> None:
    run_search(searched(pool), tmp_path / "both")
    only = searched(pool, objective=[Term("ja", corpus=str(pool / "ja.txt"))], trials=2)
    report = run_search(only, tmp_path / "ja", reuse=tmp_path / "both")
    assert (report.reused, report.trials) == (9, 2)
    assert report.best_weights["ja"] > 0.5
    shorter = searched(pool, block_length=9, trials=2)
    with pytest.raises(OptimerError, match="block_length: here 9, there 16"):
        run_search(shorter, tmp_path / "other", reuse=tmp_path / "both")


def test_another_objective_for_a_finished_run(
    pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool and settings are those of the run; its terms may have another name in the file."""
    monkeypatch.chdir(tmp_path)
    searched_first = searched(pool, seed=7, patience=0)
    run_search(searched_first, Path("runs/a"))
    assert searched_in("runs/a") == searched_first
    Path("other.yaml").write_text(
        f"objective:\n  - {{name: japanese, corpus: {pool}/ja.txt}}\ntrials: 1\n"
    )
    flags = ["--objective", "other.yaml", "--reuse", "runs/a", "--json"]
    done = CliRunner().invoke(command, flags, catch_exceptions=False)
    report = json.loads(done.stdout)
    assert (report["reused"], report["trials"]) == (9, 1)
    lines = [json.loads(x) for x in Path("runs/other/trials.jsonl").read_text().splitlines()]
    told = [x for x in lines if x["event"] == "told"]
    before = [json.loads(x) for x in Path("runs/a/trials.jsonl").read_text().splitlines()]
    first = [x for x in before if x["event"] == "told"]
    for one, other in zip(told[:9], first, strict=False):
        assert one["scores"] == {"japanese": other["scores"]["ja"]}
        assert "evaluate_s" not in one
    assert told[9]["origin"] == "smac"
    assert report["best_weights"]["ja"] > 0.5
    for wrong, message in (
        (["--objective", "other.yaml"], "needs the run to --reuse"),
        (["--objective", "none.yaml", "--reuse", "runs/a"], "no such file"),
        (["--objective", "other.yaml", "--reuse", "runs/b"], "no such file"),
        (["--objective", "other.yaml", "--reuse", "runs/a", "--base", "b"], "not both"),
    ):
        with pytest.raises(RecipeError, match=message):
            CliRunner().invoke(command, wrong, catch_exceptions=False)
    Path("empty.yaml").write_text("trials: 3\n")
    with pytest.raises(RecipeError, match="has no objective"):
        CliRunner().invoke(
            command, ["--objective", "empty.yaml", "--reuse", "runs/a"], catch_exceptions=False
        )


def test_a_share_of_every_term_is_kept_for_the_end(pool: Path, tmp_path: Path) -> None:
    report = run_search(searched(pool, trials=5, heldout_share=0.4), tmp_path / "a")
    assert [row.name for row in report.heldout][::3] == ["base", "best"]
    low, high = report.heldout[-1].low, report.heldout[-1].high
    assert low is not None and high is not None and low <= report.heldout[-1].cost <= high
    run_search(searched(pool, trials=5), tmp_path / "b")

    def blocks(folder: str) -> dict[str, int]:
        lines = (tmp_path / folder / "trials.jsonl").read_text().splitlines()
        base = next(x for x in map(json.loads, lines) if x["event"] == "told")
        return {name: len(score["parts"]) for name, score in base["scores"].items()}

    kept = json.loads((tmp_path / "a" / "heldout.json").read_text())
    held = {name: len(score["parts"]) for name, score in next(iter(kept.values())).items()}
    assert {name: n + held[name] for name, n in blocks("a").items()} == blocks("b")
    assert all(n == round(0.4 * blocks("b")[name]) for name, n in held.items())


def test_the_command_line_reads_flags_and_files_alike(pool: Path, tmp_path: Path) -> None:
    flags = ["--base", str(pool / "base"), "--vector", f"ja={pool / 'ja'}"]
    flags += ["--vector", f"math={pool / 'full-math'}", "--range", "math=0:0.8"]
    flags += ["--corpus", f"ja={pool / 'ja.txt'}", "--weight", "ja=2", "--limit", "4"]
    flags += ["--trials", "6", "--seed", "5", "--json", "-o", str(tmp_path / "flags")]
    done = CliRunner().invoke(command, flags, catch_exceptions=False)
    report = json.loads(done.stdout)
    assert report["identity"]["space"]["math"] == [0.0, 0.8]
    assert "best cost" in done.stderr
    (tmp_path / "search.yaml").write_text(
        f"""
base: {pool}/base
vectors:
  - {{name: ja, model: {pool}/ja}}
  - {{name: math, model: {pool}/full-math, range: [0, 0.8]}}
objective:
  - {{name: ja, corpus: {pool}/ja.txt, weight: 2, limit: 4}}
trials: 6
seed: 5
"""
    )
    args = [str(tmp_path / "search.yaml"), "-o", str(tmp_path / "file")]
    done = CliRunner().invoke(command, args, catch_exceptions=False)
    assert "only ja" in done.stdout and "sum of weights" in done.stdout
    ran = [tmp_path / name / "trials.jsonl" for name in ("flags", "file")]
    weights = [
        [row["weights"] for row in map(json.loads, p.read_text().splitlines()[1:])] for p in ran
    ]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "out"], "give a file, or --base"),
        (["x.yaml", "--base", "b", "-o", "out"], "not both"),
        (["x.yaml", "-o", "out"], "no such file"),
        (["--base", "b", "--vector", "ja", "-o", "out"], "'ja' is not NAME=VALUE"),
        (["--base", "b", "--vector", "a=m", "--vector", "a=n", "-o", "o"], "'a' is given twice"),
        (["--base", "b", "--vector", "a=m", "--range", "b=0:1", "-o", "o"], "no 'b'; there are a"),
        (["--base", "b", "--vector", "a=m", "--task", "t=sums", "-o", "o"], "task and metric"),
    ],
)
def test_wrong_command_lines_are_refused_before_anything_is_written(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(command, arguments)
    assert isinstance(result.exception, RecipeError)
    assert message in str(result.exception)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_checkpoint_or_objective_leaves_no_run_folder(pool: Path, tmp_path: Path) -> None:
    absent = [Vector("ja", str(pool / "absent"))]
    for wrong in ({"vectors": absent}, {"objective": []}, {"objective": [Term("ja")]}):
        with pytest.raises(OptimerError):
            run_search(searched(pool, **wrong), tmp_path / "run")
        assert not (tmp_path / "run").exists()


# gradients ----------------------------------------------------------------------------------------


def test_gradients_by_weight_are_those_of_finite_differences(
    pool: Path, tokenizer: Fast, tmp_path: Path
) -> None:
    """⟨∇L, τ_i⟩, streamed, against (L(w + h·e_i) − L(w − h·e_i)) / 2h."""
    from optimer_engine.planner import plan
    from optimer_engine.search.gradient import loss_and_gradient
    from optimer_engine.sink import LiveModelSink

    sources = [
        {"name": "ja", "model": str(pool / "ja"), "weight": 0.3},
        {"name": "math", "model": str(pool / "full-math"), "weight": 0.2},
    ]
    made = plan({"base": str(pool / "base"), "sources": sources, "out_dtype": "float32"})
    model = AutoModelForCausalLM.from_pretrained(pool / "base").eval()
    objective = CorpusObjective(
        {n: pool / f"{n}.txt" for n in TEXTS}, tokenizer, block_length=16, batch_size=4
    )
    goal = {"ja": 3.0, "math": 1.0}
    examples = {"ja": [0, 2, 3, 5, 7, 8], "math": [1, 2]}

    def loss(weights: dict[str, float]) -> float:
        made.with_weights(weights).run(LiveModelSink(model))
        scores = objective(model, examples)
        return sum(goal[n] / 4.0 * scores[n].value for n in goal)

    point = {"ja": 0.3, "math": 0.2}
    expected = [
        (loss(point | {n: w + 0.004}) - loss(point | {n: w - 0.004})) / 0.008
        for n, w in point.items()
    ]
    value = loss(point)
    found, slopes = loss_and_gradient(made, model, objective, goal, list(point), examples)
    assert found == pytest.approx(value, rel=1e-5)
    assert slopes == pytest.approx(expected, rel=0.02, abs=1e-4)
    assert all(p.grad is None for p in model.parameters())


def test_a_search_can_start_from_gradients(pool: Path, tmp_path: Path) -> None:
    report = run_search(searched(pool, gradient_steps=4, trials=8), tmp_path / "a")
    lines = [json.loads(x) for x in (tmp_path / "a" / "trials.jsonl").read_text().splitlines()]
    origins = [x["origin"] for x in lines if x["event"] == "told"]
    assert origins.count("gradient") == 1 and origins.index("gradient") == 6
    assert report.best_cost <= min(row.cost for row in report.table)
    with pytest.raises(RecipeError, match="nothing but corpora has gradients"):
        run_search(searched(pool, gradient_steps=4), tmp_path / "b", objective=lambda model: 0.0)
    assert not (tmp_path / "b").exists()


def test_programs_and_heldout_text_on_real_merges(pool: Path, tmp_path: Path) -> None:
    """A program reads each trial's checkpoint; the winner is scored on text of its own."""
    script = tmp_path / "norm.py"
    script.write_text(
        "import sys\n"
        "from safetensors.numpy import load_file\n"
        "w = load_file(sys.argv[1] + '/model.safetensors')['model.norm.weight']\n"
        "print(float(((w - 1) ** 2).sum()))\n"
    )
    (tmp_path / "other.txt").write_text(" ".join(f"{n} plus {n} is {2 * n}." for n in range(40)))
    command = [sys.executable, str(script), "{model}"]
    both = searched(
        pool, trials=4,
        objective=[
            Term("ja", corpus=str(pool / "ja.txt")),
            Term("drift", command=command, higher_is_better=False, weight=0.1),
        ],
        heldout=[Term("test", corpus=str(tmp_path / "other.txt"))],
    )  # fmt: skip
    report = run_search(both, tmp_path / "run")
    rows = {row.name: row for row in report.table}
    assert rows["base"].scores["drift"] == 0.0 < rows["only ja"].scores["drift"]
    assert [row.name for row in report.heldout][::3] == ["base", "best"]
    assert report.heldout[0].cost == 0.0
    low, high = report.heldout[-1].low, report.heldout[-1].high
    assert low is not None and high is not None and low <= report.heldout[-1].cost <= high
    same = searched(pool, heldout=[Term("test", corpus=str(pool / "ja.txt"))])
    with pytest.raises(RecipeError, match="reads the same file as 'ja' of the objective"):
        run_search(same, tmp_path / "leak")


def test_any_trial_is_merged_by_its_number(pool: Path, tmp_path: Path) -> None:
    run_search(searched(pool, trials=6), tmp_path)
    done = CliRunner().invoke(
        command, ["--merge", "2", "-o", str(tmp_path), "--json"], catch_exceptions=False
    )
    folder = Path(json.loads(done.stdout)["out"])
    assert folder == tmp_path / "trial-2"
    alone = AutoModelForCausalLM.from_pretrained(pool / "full-ja").state_dict()
    made = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name, tensor in alone.items():  # trial 2 is ja alone
        torch.testing.assert_close(made[name], tensor, rtol=0, atol=1e-6)
    with pytest.raises(RecipeError, match="no trial 99"):
        CliRunner().invoke(command, ["--merge", "99", "-o", str(tmp_path)], catch_exceptions=False)


# more than one weight per vector ------------------------------------------------------------------


def test_layer_groups_and_method_parameters_are_searched_and_reproduced(
    pool: Path, tokenizer: Fast, tmp_path: Path
) -> None:
    """Live merges, the winner on disk, its recipe and any trial by number are the same merges."""
    config = searched(
        pool,
        vectors=[
            Vector("ja", str(pool / "ja"), parameters={"density": [0.3, 1.0]}),
            Vector("math", str(pool / "full-math"), parameters={"density": 0.8}),
        ],
        merge_method="dare_linear",
        parameters={"lambda": [0.5, 1.5], "rescale": False},
        layer_groups=2,
        trials=10,
        first_share=1.0,
    )
    run = tmp_path / "run"
    report = run_search(config, run)
    assert list(report.best_weights) == [
        "ja 1/2", "ja 2/2", "math 1/2", "math 2/2", "lambda", "ja density",
    ]  # fmt: skip
    rows = {row.name: row for row in report.table}
    assert rows["only ja"].weights == {
        "ja 1/2": 1.0, "ja 2/2": 1.0, "math 1/2": 0.0, "math 2/2": 0.0,
        "lambda": 1.0, "ja density": 1.0,
    }  # fmt: skip
    assert rows["base"].cost == 0.0 and report.ratios.keys() == {"ja", "math"}
    objective = CorpusObjective({n: pool / f"{n}.txt" for n in TEXTS}, tokenizer, block_length=16)

    def scores(folder: Path) -> dict[str, float]:
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        return {name: score.value for name, score in objective(model).items()}

    assert scores(run / "best") == rows["best"].scores
    told = [json.loads(line) for line in (run / "trials.jsonl").read_text().splitlines()]
    trial = next(t for t in told if t["event"] == "told" and t["origin"] == "smac")
    assert len(set(trial["weights"].values())) > 3
    merged = merge_trial(run, trial["number"])
    assert scores(merged) == {n: s["value"] for n, s in trial["scores"].items()}
    recipe = Recipe.load(run / "best.yaml")
    assert recipe.method == "dare_linear" and recipe.parameters["rescale"] is False
    merge(recipe, tmp_path / "again")
    assert scores(tmp_path / "again") == rows["best"].scores
    assert run_search(config, run).best_weights == report.best_weights
    assert "ja density" in write_page(run).read_text("utf-8")
    plain = searched(pool)
    with pytest.raises(OptimerError, match="cannot be reused"):
        run_search(plain, tmp_path / "plain", reuse=run)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"merge_method": "tise"}, "no merge method 'tise'"),
        ({"merge_method": "slerp"}, "slerp has no weights to search"),
        ({"parameters": {"density": [0.1, 0.9]}}, "task_arithmetic has no parameter 'density'"),
        ({"merge_method": "ties", "parameters": {"density": [0.9, 0.1]}}, r"must be \[low, high\]"),
        ({"merge_method": "ties", "parameters": {"density": [0.5, 1.5]}}, "1.5 is outside 0 to 1"),
        ({"merge_method": "ties", "parameters": {"normalize": [0, 1]}}, "is not a bool"),
        ({"layer_groups": 0}, "layer_groups must be 1 or more"),
        ({"layer_groups": 2, "gradient_steps": 3}, "gradient_steps are for one weight per vector"),
        ({"layer_groups": 3}, "3 groups of layers, and the base has 2 layers"),
    ],
)
def test_merges_that_cannot_be_searched_are_refused(
    pool: Path, tmp_path: Path, wrong: dict[str, object], message: str
) -> None:
    with pytest.raises(OptimerError, match=message):
        run_search(searched(pool, **wrong), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_packed_vectors_are_searched_and_exact_ones_merged(pool: Path, tmp_path: Path) -> None:
    from optimer_engine.packing import pack

    for mode in ("int4", "exact"):
        for name in TEXTS:
            pack(pool / "base", pool / f"full-{name}", tmp_path / f"{name}-{mode}", mode=mode)
    vectors = [
        Vector(name, str(tmp_path / f"{name}-int4"), final=str(tmp_path / f"{name}-exact"))
        for name in TEXTS
    ]
    config = searched(pool, vectors=vectors)
    report = run_search(config, tmp_path / "run")
    found = report.final
    assert found is not None and found.vectors == sorted(TEXTS)

    weights = report.best_weights
    scores = {}
    for form in ("int4", "exact"):
        sources = [
            {"name": n, "model": str(tmp_path / f"{n}-{form}"), "weight": weights[n]} for n in TEXTS
        ]
        merge({"base": str(pool / "base"), "sources": sources}, tmp_path / form)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / form)
        files = {name: pool / f"{name}.txt" for name in TEXTS}
        tokenizer = Fast.from_pretrained(pool / "base")
        objective = CorpusObjective(files, tokenizer, block_length=16)
        scores[form] = {name: score.value for name, score in objective(model).items()}
    assert found.searched == pytest.approx(scores["int4"], rel=1e-6)
    assert found.final == pytest.approx(scores["exact"], rel=1e-6)
    assert found.final != found.searched
    gaps = [found.final[n] - found.searched[n] for n in TEXTS]
    assert found.cost == pytest.approx(sum(gaps) / 2, abs=1e-9)
    assert found.low is not None and found.low <= found.cost <= found.high
    best = (tmp_path / "run" / "best" / "model.safetensors").read_bytes()
    assert best == (tmp_path / "exact" / "model.safetensors").read_bytes()

    before = (tmp_path / "run" / "final.json").stat().st_mtime_ns
    again = run_search(config, tmp_path / "run")
    assert again.final == found
    assert (tmp_path / "run" / "final.json").stat().st_mtime_ns == before
    assert "merged from the final form of ja, math" in table(again, config)
    with pytest.raises(OptimerError, match="base"):
        stranger = [Vector("ja", str(tmp_path / "ja-int4"), final=str(pool / "base"))]
        run_search(searched(pool, vectors=stranger, base=str(pool / "full-ja")), tmp_path / "no")
