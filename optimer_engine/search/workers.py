"""Many scorers: one per worker process of a Dask cluster, on this machine or on others.

    with on_this_machine(4, make, ...) as crew:            # processes of our own
    with on_cluster("tcp://host:8786", make, ...) as crew:   # whatever workers it has and gets

Each worker holds one subject in an actor: it opens the checkpoints and loads the model once, and
lets them go when the search ends or dies. The loop asks, decides and writes the journal alone.

**A worker that dies loses nothing but time**: its trial is scored again by another one, from what
was known of it. A trial that two workers died with (out of memory, most likely) counts as crashed.
Workers that join later get trials from then on.

Dask is what SMAC itself runs on; but SMAC's own runner pickles the whole objective to a worker for
every trial, so here its ask is used and its runner is not.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from optimer_engine.errors import MismatchError, MissingExtraError, OptimerError, RecipeError
from optimer_engine.search.crew import Answer, Scorer, said_late
from optimer_engine.search.identity import refuse_other
from optimer_engine.search.objective import Examples, Scores
from optimer_engine.search.subject import Subject

log = logging.getLogger(__name__)

DEATHS = 2
"""Workers that may die with a trial before it counts as crashed."""
WAIT_S = 60.0
"""How long a search waits for a first worker, or for one in place of the last."""
LOOK_S = 1.0
"""How often the cluster is asked who is there."""
CLOSE_S = 5.0
"""How long workers may take to let go; Dask takes the rest from them."""
TICK_S = 0.02

Make = Callable[[], Subject]


@contextmanager
def on_this_machine(
    count: int, make: Make, identity: Any, device: str, limit_s: float | None = None
) -> Iterator[Workers]:
    """A crew of ``count`` processes, each with its share of the cores and, on ``cuda``, one GPU.

    Raises:
        MissingExtraError: without Dask.
        RecipeError: there are fewer GPUs.
    """
    distributed = _dask("--workers")
    gpus = _gpus(count) if device.startswith("cuda") else []
    threads = str(max(1, len(os.sched_getaffinity(0)) // count))
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    settings = {
        # a process that was stopped, or held the interpreter for long, is no lost one; the death of
        # a process of this machine is seen at once
        "distributed.scheduler.worker-ttl": None,
    }
    with distributed.dask.config.set(settings):
        cluster = distributed.LocalCluster(
            n_workers=count,
            threads_per_worker=1,
            processes=True,
            memory_limit=0,  # Dask would kill a worker for holding a large model
            dashboard_address="127.0.0.1:0",  # None would take port 8787, or warn that it is taken
            scheduler_kwargs={"dashboard": False},
            silence_logs=logging.CRITICAL,
            env=dict.fromkeys(names, threads),
        )
    with cluster, distributed.Client(cluster) as client:
        crew = Workers(client, make, identity, gpus, limit_s)
        try:
            yield crew
        finally:
            crew.close()


@contextmanager
def on_cluster(
    scheduler: str, make: Make, identity: Any, limit_s: float | None = None
) -> Iterator[Workers]:
    """A crew of all workers that the cluster has and gets.

    Each takes one trial at a time; on machines with several GPUs, start one worker per GPU with its
    ``CUDA_VISIBLE_DEVICES``, as dask-cuda does. All paths must mean the same on its workers.

    Raises:
        MissingExtraError: without Dask.
        RecipeError: no scheduler answers at this address.
    """
    distributed = _dask("--dask-scheduler")
    try:
        client = distributed.Client(scheduler, timeout=10)
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"no Dask scheduler answers: {error}", where=scheduler, todo="check its address"
        ) from error
    with client:
        crew = Workers(client, make, identity, [], limit_s)
        try:
            yield crew
        finally:
            crew.close()


@dataclass
class _Work:
    """A trial that is being scored."""

    weights: dict[str, float]
    examples: Examples | None
    address: str | None = None  # of the worker that holds its merge
    answer: Any = None  # Dask's future; None while no worker has it
    since_s: float = 0.0
    lost: str = ""  # why, of a worker that died with it


class Workers:
    """A crew on Dask workers; see the module docstring.

    Args:
        client: connected to the cluster.
        make: makes the subject, on a worker.
        identity: what the subject must be, by content; see `Scorer.identity`.
        gpus: what each worker's ``CUDA_VISIBLE_DEVICES`` is set to, one each.
        limit_s: how long scoring may take; a worker that takes longer is restarted.
    """

    def __init__(
        self, client: Any, make: Make, identity: Any, gpus: list[str], limit_s: float | None
    ) -> None:
        self._client, self._make, self._identity = client, make, identity
        self._limit_s = limit_s
        self._gpus = dict.fromkeys(gpus, "")  # to the address of the worker that has it
        self._scorers: dict[str, Any] = {}
        self._work: dict[int, _Work] = {}
        self._deaths: Counter[int] = Counter()
        self._looked_s = float("-inf")
        self._stuck: set[str] = set()

    def seats(self) -> int:
        """One per worker; waits for the first."""
        self._look()
        waited_s = time.monotonic() + WAIT_S
        while not self._scorers:
            if time.monotonic() > waited_s:
                raise OptimerError(
                    f"the cluster has had no worker for {WAIT_S:.0f} s",
                    where="workers",
                    todo="start workers and run the same command again; it goes on from here",
                )
            time.sleep(TICK_S)
            self._look()
        return len(self._scorers)

    def score(self, number: int, weights: dict[str, float], examples: Examples | None) -> None:
        """Send it to the worker that holds the trial, or to a free one as soon as there is one."""
        before = self._work.get(number)
        held_by = None if before is None else before.address
        self._work[number] = _Work(weights, examples, held_by)
        self._hand_out()

    def answer(self) -> tuple[int, Answer]:
        """The first answer that is there; see `Crew.answer`."""
        while True:
            for number, work in list(self._work.items()):
                if work.answer is not None and work.answer.done():
                    future, work.answer = work.answer, None
                    try:
                        return number, future.result()
                    except OptimerError:
                        raise
                    except Exception as error:  # Dask's own: the worker has gone
                        self._forget(str(work.address), f"{type(error).__name__}: {error}")
                late_s = time.monotonic() - work.since_s - (self._limit_s or math.inf)
                if work.answer is not None and late_s > 0:
                    self._restart(str(work.address))
                    said = said_late(float(self._limit_s or 0.0))
                    return number, Answer("crashed", error=f"TimeoutError: {said}")
                if self._deaths[number] >= DEATHS:
                    said = f"{DEATHS} workers died with it, short of memory? ({work.lost})"
                    return number, Answer("crashed", error=said)
            self.seats()
            self._hand_out()
            time.sleep(TICK_S)

    def done(self, number: int) -> None:
        """Free its worker."""
        self._work.pop(number, None)
        self._deaths.pop(number, None)

    def heldout(self, weights: dict[str, float]) -> Scores:
        """Scores on the held-out terms, by any worker."""
        scores: Scores = self._by_anyone("heldout", weights)
        return scores

    def gradient_start(self) -> dict[str, float]:
        """The weights that gradients lead to, by any free worker."""
        weights: dict[str, float] = self._by_anyone("gradient_start")
        return weights

    def close(self) -> None:
        """Let every worker drop its subject."""
        calls = []
        for address in self._scorers:
            with suppress(_LostError):
                calls.append(self._call(address, "close"))
        ends_s = time.monotonic() + CLOSE_S
        while not all(call.done() for call in calls) and time.monotonic() < ends_s:
            time.sleep(TICK_S)
        self._scorers.clear()

    def _by_anyone(self, method: str, *arguments: Any) -> Any:
        while True:
            self.seats()
            busy = {work.address for work in self._work.values()}
            free = [address for address in self._scorers if address not in busy]
            if free:
                try:
                    return self._await(free[0], self._call(free[0], method, *arguments))
                except _LostError as error:
                    self._forget(free[0], str(error))
            time.sleep(TICK_S)

    def _hand_out(self) -> None:
        """Give every trial that waits to its worker, or to a free one."""
        busy = {work.address for work in self._work.values()}
        free = [address for address in self._scorers if address not in busy]
        for number, work in self._work.items():
            if work.answer is not None or self._deaths[number] >= DEATHS:
                continue
            address = work.address or (free.pop(0) if free else None)
            if address is None:
                continue
            try:
                work.answer = self._call(address, "score", work.weights, work.examples)
            except _LostError as error:
                self._forget(address, str(error))
            else:
                work.address, work.since_s = address, time.monotonic()

    def _call(self, address: str, method: str, *arguments: Any) -> Any:
        """Begin a scorer's method; its future.

        Raises:
            _LostError: Dask knows that the worker has gone.
        """
        scorer, _ = self._scorers[address]
        try:
            return getattr(scorer, method)(*arguments)
        except RuntimeError as error:
            raise _LostError(str(error)) from error

    def _look(self) -> None:
        """See which workers have gone, and put a scorer on those that have come."""
        if time.monotonic() < self._looked_s + LOOK_S:
            return
        self._looked_s = time.monotonic()
        there = self._there()
        for address in self._scorers.keys() - there:
            self._forget(address, "it left the cluster")
        new = sorted(there - self._scorers.keys())
        made = {address: self._submit(address) for address in new}
        for address, future in made.items():
            try:
                scorer = self._await(address, future)
                theirs = self._await(address, scorer.identity())
            except _LostError:
                self._forget(address, "it left the cluster")
                continue
            for mine, other in zip(self._identity, theirs, strict=True):
                try:
                    refuse_other(mine, other, f"worker {address} has another pool")
                except MismatchError as error:
                    error.todo = "let all paths mean the same on every worker"
                    raise
            self._scorers[address] = scorer, future  # Dask keeps an actor as long as its future

    def _submit(self, address: str) -> Any:
        gpu = next((name for name, user in self._gpus.items() if not user), None)
        if gpu is not None:
            self._gpus[gpu] = address
        return self._client.submit(
            Scorer, self._make, gpu,
            actor=True, workers=[address], allow_other_workers=False, pure=False,
        )  # fmt: skip

    def _there(self) -> set[str]:
        try:
            return set(self._client.nthreads()) - self._stuck
        except OSError as error:
            raise OptimerError(
                f"the Dask scheduler does not answer any more: {error}",
                where="workers",
                todo="run the same command again; it goes on from here",
            ) from error

    def _await(self, address: str, future: Any) -> Any:
        """The result of what runs on one worker.

        Raises:
            _LostError: the worker has gone.
        """
        looked_s = time.monotonic()
        while not future.done():
            time.sleep(TICK_S)
            if time.monotonic() > looked_s + LOOK_S:
                looked_s = time.monotonic()
                if address not in self._there():
                    raise _LostError("it left the cluster")
        try:
            return future.result()
        except OptimerError:
            raise
        except Exception as error:
            if address not in self._there():
                raise _LostError("it left the cluster") from error
            raise OptimerError(
                f"cannot be used: {type(error).__name__}: {error}",
                where=f"worker {address}",
                todo="install the same versions there as here, or stop this worker",
            ) from error

    def _forget(self, address: str, why: str) -> None:
        """A worker has gone: what it was scoring is for another one."""
        log.warning("worker %s is lost: %s", address, why)
        self._scorers.pop(address, None)
        self._gpus = {gpu: "" if user == address else user for gpu, user in self._gpus.items()}
        for number, work in self._work.items():
            if work.address == address:
                work.address, work.answer, work.lost = None, None, why
                self._deaths[number] += 1

    def _restart(self, address: str) -> None:
        """Stop a worker; its nanny, where it has one, starts another in its place."""
        try:
            self._client.restart_workers([address], timeout=30, raise_for_error=False)
        except Exception as error:  # no nanny: then it is lost to this search
            log.warning("worker %s cannot be restarted: %s", address, error)
            self._stuck.add(address)
        self._forget(address, "its trial took too long")


class _LostError(Exception):
    """The worker that was asked has gone."""


def _gpus(count: int) -> list[str]:
    """A visible GPU for each of ``count`` workers."""
    import torch

    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = range(torch.cuda.device_count())
    gpus = [str(i) for i in found] if listed is None else [g for g in listed.split(",") if g]
    if len(gpus) < count:
        raise RecipeError(
            f"{count} workers need a GPU each, and {len(gpus)} can be seen",
            where="--workers",
            todo="ask for fewer workers",
        )
    return gpus[:count]


def _dask(flag: str) -> Any:
    try:
        import distributed
    except ImportError as error:
        raise MissingExtraError(
            "dask.distributed is not installed",
            where=flag,
            todo="pip install 'optimer-engine[spread]'",
        ) from error
    return distributed
