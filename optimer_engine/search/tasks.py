"""lm-eval as an objective: its tasks and metrics, on a model whose weights change in place.

One evaluation through lm-eval's front door builds an index of its fourteen thousand task names,
loads data sets, writes an environment report and bootstraps errors: tens of seconds around a short
measurement. Here tasks are loaded, requests built and texts tokenised once, and only its
``evaluate`` is called per trial, on one wrapper around the live model. Building requests once also
keeps few-shot examples: lm-eval draws them anew each time, and a trial would be compared with the
base on other prompts. Its response cache is never used: it keys on the request and would answer for
the previous weights.

Task files are configuration, but a line ``!function module.name`` in one imports Python code beside
it. Such files are refused unless the user allows them. Tasks shipped inside lm-eval (no
``tasks_dir``) are trusted as the installed library is, but for those that run what the model writes
(``unsafe_code``, such as humaneval), which need the same permission.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from optimer_engine.errors import MissingExtraError, RecipeError
from optimer_engine.search.config import Term
from optimer_engine.search.objective import Score, Scores

FEWSHOT_SEED = 1234  # lm-eval's own default, so that scores agree with its command line


class TaskObjective:
    """Metrics of lm-eval tasks.

    Args:
        terms: each with task and metric (``acc``, or ``exact_match,strict-match`` with its filter);
            two metrics of one task are measured in one evaluation.
        tokenizer: of the models that will be scored.
        batch_size: requests per forward pass.
        allow_task_code: accept task files with ``!function``, and tasks that run model output.

    Raises:
        RecipeError: a task or folder does not exist, a task file carries code, or two terms ask for
            one task in different ways.
        MissingExtraError: lm-eval is not installed.
    """

    def __init__(
        self,
        terms: Sequence[Term],
        tokenizer: Any,
        *,
        batch_size: int = 16,
        allow_task_code: bool = False,
    ) -> None:
        folders = sorted({t.tasks_dir for t in terms if t.tasks_dir is not None})
        for folder in folders:
            if not Path(folder).is_dir():
                raise RecipeError("no such folder", where=f"tasks_dir {folder}")
            if not allow_task_code:
                refuse_code(Path(folder))
        self._terms, self._tokenizer, self._batch_size = list(terms), tokenizer, batch_size
        self._allow_task_code = allow_task_code
        self._lm: Any = None
        with _quiet():
            try:
                from lm_eval.tasks import TaskManager
            except ImportError as error:
                raise MissingExtraError(
                    f"lm-eval is not there: {error}", todo="pip install 'optimer-engine[eval]'"
                ) from error
            manager = TaskManager(
                include_path=folders or None,
                include_defaults=any(t.tasks_dir is None for t in terms),
            )
            if not allow_task_code:
                _refuse_unsafe(manager.task_index, self._terms)
            self._loaded = _load(manager, self._terms)
            if not allow_task_code:  # whatever the files said: now it is known of the tasks
                for name, task in self._loaded["tasks"].items():
                    if getattr(task, "UNSAFE_CODE", False):
                        _refuse_unsafe_task(name)
        self._samples = {
            str(t.task): list(range(len(self._docs(t.task))))[: t.limit] for t in self._terms
        }
        for name, numbers in self._samples.items():
            _keep_requests(self._loaded["tasks"][name], numbers)

    @property
    def identity(self) -> dict[str, dict[str, Any]]:
        """By term: task, metric, shots, and sha256 of the documents scored."""
        return {
            t.name: {
                "kind": "lm_eval",
                "task": t.task,
                "metric": t.metric,
                "num_fewshot": self._loaded["tasks"][t.task].config.num_fewshot,
                "data": self._digest(str(t.task)),
            }
            for t in self._terms
        }

    @property
    def counts(self) -> dict[str, int]:
        """By term: its number of examples."""
        return {t.name: len(self._samples[str(t.task)]) for t in self._terms}

    def __call__(self, model: Any, examples: Mapping[str, Sequence[int]] | None = None) -> Scores:
        """Scores of the terms; parts are per example where the metric is a mean of examples.

        Terms of one task are asked for the same examples, and evaluated once.
        """
        terms = self._terms if examples is None else [t for t in self._terms if t.name in examples]
        samples = {str(t.task): self._samples[str(t.task)] for t in terms}
        if examples is not None:
            samples = {str(t.task): sorted({*examples[t.name]}) for t in terms}
        with _quiet():
            from lm_eval.evaluator import evaluate

            lm = self._wrapped(model)
            results = evaluate(
                lm=lm,
                task_dict={**self._loaded, "tasks": {n: self._loaded["tasks"][n] for n in samples}},
                samples=samples,
                bootstrap_iters=0,
                log_samples=True,
                confirm_run_unsafe_code=self._allow_task_code,
            )
        return {t.name: _score(results, t) for t in terms}

    def _wrapped(self, model: Any) -> Any:
        """lm-eval's wrapper around the live model; its weights are those of the moment."""
        if self._lm is None or self._lm.model is not model:
            self._lm = _hflm()(
                pretrained=model,
                tokenizer=self._tokenizer,
                batch_size=self._batch_size,
                trust_remote_code=False,
            )
        model.eval()
        return self._lm

    def _docs(self, name: str | None) -> Any:
        return self._loaded["tasks"][name].eval_docs

    def _digest(self, name: str) -> str:
        task, docs = self._loaded["tasks"][name], self._docs(name)
        digest = hashlib.sha256()
        for i in self._samples[name]:
            pair = [task.doc_to_text(docs[i]), task.doc_to_target(docs[i]), docs[i]]
            digest.update(json.dumps(pair, sort_keys=True, default=str).encode())
        return digest.hexdigest()


def _keep_requests(task: Any, numbers: list[int]) -> None:
    """Let ``task`` build the requests of its documents ``numbers`` once, all in their order."""
    build = task.build_all_requests
    kept: dict[int, list[Any]] = {}

    def again(*, samples: list[int], limit: int | None = None, **settings: Any) -> None:
        if not kept:
            build(samples=numbers, limit=limit, **settings)
            for request in task.instances:  # lm-eval counts documents among those asked for
                kept.setdefault(numbers[request.doc_id], []).append(request)
        task._instances = [
            dataclasses.replace(
                request,
                metadata=(request.task_name, place, request.repeats),
                resps=[],
                filtered_resps={},
            )
            for place, number in enumerate(sorted(samples))
            for request in kept[number]
        ]

    task.build_all_requests = again


@functools.cache
def _hflm() -> Any:
    """lm-eval's wrapper, which tokenises each text once: weights change, texts do not."""
    from lm_eval.models.huggingface import HFLM

    class Remembering(HFLM):
        def tok_encode(
            self,
            string: str,
            add_special_tokens: bool | None = None,
            left_truncate_len: int | None = None,
            **more: Any,
        ) -> list[int]:
            found = self.__dict__.setdefault("_encoded", {})
            key = string, add_special_tokens, left_truncate_len
            if key not in found:
                found[key] = super().tok_encode(
                    string, add_special_tokens, left_truncate_len, **more
                )
            return list(found[key])

    return Remembering


def refuse_code(folder: Path) -> None:
    """Refuse task files that would import Python.

    Every YAML file under ``folder`` is read, and every file they include.

    Raises:
        RecipeError: naming the file and line that carries ``!function`` or a task ``class``.
    """
    pending = sorted([*folder.rglob("*.yaml"), *folder.rglob("*.yml")])
    seen: set[Path] = set()
    while pending:
        path = pending.pop().resolve()
        if path in seen:
            continue
        seen.add(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"cannot be read: {error}", where=str(path)) from error
        pending += [path.parent / name for name in _includes_of(text, path)]


def _includes_of(text: str, path: Path) -> list[str]:
    import yaml

    try:
        events = list(yaml.parse(text, Loader=yaml.SafeLoader))
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"not valid YAML: {error}", where=str(path)) from error
    for event in events:
        tag = getattr(event, "tag", None)
        if tag is not None and not tag.startswith("tag:yaml.org,2002:"):
            raise RecipeError(
                f"the tag {tag} makes lm-eval import Python code from beside this file",
                where=f"{path}, line {getattr(event.start_mark, 'line', 0) + 1}",
                todo="read that code and, if you trust it, set allow_task_code: true",
            )
    found: list[str] = []
    if isinstance(root, yaml.MappingNode):
        for key, value in root.value:
            if key.value == "class":
                raise RecipeError(
                    "`class` makes lm-eval run a Python class",
                    where=f"{path}, line {key.start_mark.line + 1}",
                    todo="read that code and, if you trust it, set allow_task_code: true",
                )
            if key.value == "include":
                names = value.value if isinstance(value, yaml.SequenceNode) else [value]
                found += [name.value for name in names]
    return found


def _refuse_unsafe(index: Mapping[str, Any], terms: Sequence[Term]) -> None:
    """Before a task is loaded: loading may already import what runs code."""
    for term in terms:
        cfg = getattr(index.get(str(term.task)), "cfg", None) or {}
        if cfg.get("unsafe_code"):
            _refuse_unsafe_task(str(term.task))


def _refuse_unsafe_task(name: str) -> NoReturn:
    raise RecipeError(
        "runs the code that the model writes, on this machine",
        where=f"task {name!r}",
        todo="search in a container without secrets, and set allow_task_code: true",
    )


def _load(manager: Any, terms: list[Term]) -> dict[str, Any]:
    wanted: dict[str, Term] = {}
    for term in terms:
        other = wanted.setdefault(str(term.task), term)
        if (other.limit, other.num_fewshot) != (term.limit, term.num_fewshot):
            raise RecipeError(
                f"asks for task {term.task!r} with other limit or num_fewshot than {other.name!r}",
                where=f"objective {term.name!r}",
                todo="give both terms the same",
            )
    unknown = sorted(set(wanted) - set(manager.all_tasks))
    if unknown:
        raise RecipeError(
            f"no task {unknown[0]!r}; found {', '.join(sorted(manager.all_tasks)[:8]) or 'none'}",
            where=f"objective {wanted[unknown[0]].name!r}",
            todo="check the name after `task:` in the files of tasks_dir",
        )
    try:
        loaded = manager.load(sorted(wanted))
    except Exception as error:  # lm-eval raises whatever its data loading meets
        raise RecipeError(f"lm-eval cannot load {', '.join(sorted(wanted))}: {error}") from error
    groups = sorted(set(wanted) - set(loaded["tasks"]))
    if groups:
        raise RecipeError(
            f"{groups[0]!r} is a group of tasks", todo="name its tasks, one term each"
        )
    for name, term in wanted.items():
        task = loaded["tasks"][name]
        shots = term.num_fewshot if term.num_fewshot is not None else task.config.num_fewshot
        task.set_config(key="num_fewshot", value=shots or 0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return loaded


def _score(results: dict[str, Any], term: Term) -> Score:
    metric, _, wanted = str(term.metric).partition(",")
    row = results["results"][term.task]
    keys = [k for k in row if k.partition(",")[0] == metric and (not wanted or k == term.metric)]
    if not keys:
        known = sorted(k for k in row if "," in k and "_stderr" not in k)
        raise RecipeError(
            f"task {term.task!r} has no metric {term.metric!r}; it has {', '.join(known)}",
            where=f"objective {term.name!r}",
        )
    value, chosen = float(row[keys[0]]), keys[0].partition(",")[2]
    higher = results["higher_is_better"].get(term.task, {}).get(metric)
    examples = [s[metric] for s in results["samples"][term.task] if s["filter"] == chosen]
    if metric == "bits_per_byte":
        parts = [-ll / math.log(2.0) for ll, _ in examples]
        score = Score.of(parts, [size for _, size in examples])
    elif all(isinstance(x, (int, float)) for x in examples):
        score = Score.of([float(x) for x in examples])
    else:
        score = Score(value)
    mean = math.isclose(score.value, value, rel_tol=1e-6, abs_tol=1e-9)
    return Score(value, higher is not False, *((score.parts, score.sizes) if mean else ()))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval without its environment variables, log lines and progress bars."""
    before = set(os.environ)
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for name in set(os.environ) - before:
            del os.environ[name]
