"""Run a case: the gate, then rounds in which every contestant takes its turn.

Round 0 warms caches, compiles what is compiled once, and has its outputs checked. If ours is wrong,
nothing is timed. The order is turned by one from round to round, so that nobody always runs behind
the same neighbour.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.accuracy import Accuracy
from benchmarks.measure import Cost
from benchmarks.record import Record, Row, Spread, library_versions, machine_card


class GateError(Exception):
    """Our output is wrong: there is no speed to speak of."""


@dataclass
class Contestant:
    """One thing that is measured.

    Attributes:
        name, kind, moved_bytes, compared_to: as in `record.Row`.
        run: does the work once and says what it cost.
        check: compares the output of the last run with the oracle.
        before: what is done before each run, behind the case's own.
    """

    name: str
    kind: str
    moved_bytes: int
    run: Callable[[], Cost]
    compared_to: str | None = None
    check: Callable[[], Accuracy] | None = None
    before: Callable[[], None] | None = None


@dataclass
class Case:
    """A set of contestants on the same input.

    Attributes:
        before: brings the machine into the same state before each run.
        versions: of the rivals that took part.
    """

    name: str
    command: str
    parameters: dict[str, int | float | str | bool | list[float]]
    contestants: list[Contestant]
    before: Callable[[], None]
    versions: dict[str, str] = field(default_factory=dict)


def run(case: Case, rounds: int) -> Record:
    """Measure `case`.

    Raises:
        GateError: when our output fails against the oracle; nothing has been timed then.
    """
    from tqdm import tqdm

    order = sorted(case.contestants, key=lambda c: c.kind != "ours")
    with tqdm(total=len(order) * (rounds + 1), unit="run", delay=2) as progress:

        def once(contestant: Contestant) -> Cost:
            progress.set_description(contestant.name)
            case.before()
            if contestant.before is not None:
                contestant.before()
            cost = contestant.run()
            progress.update()
            return cost

        accuracies = {}
        unchecked = [c for c in order if c.kind == "rival" and c.check is None]
        for contestant in order:
            if contestant in unchecked[1:]:  # the first has brought the program into the cache
                progress.update()
                continue
            once(contestant)
            if contestant.check is not None:
                accuracies[contestant.name] = _checked(contestant)
        load_before = os.getloadavg()[0]
        costs: dict[str, list[Cost]] = {contestant.name: [] for contestant in order}
        for number in range(rounds):
            shift = number % len(order)
            for contestant in order[shift:] + order[:shift]:
                costs[contestant.name].append(once(contestant))
    return Record(
        case=case.name,
        command=case.command,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        parameters=case.parameters,
        machine=machine_card(),
        versions=library_versions(**case.versions),
        load_average=[load_before, os.getloadavg()[0]],
        rows=[_row(c, costs, accuracies.get(c.name)) for c in case.contestants],
    )


def _checked(contestant: Contestant) -> Accuracy:
    assert contestant.check is not None
    accuracy = contestant.check()
    if contestant.kind == "ours" and not accuracy.passes:
        raise GateError(f"{contestant.name}: the output is wrong, no speed is printed: {accuracy}")
    return accuracy


def _row(contestant: Contestant, costs: dict[str, list[Cost]], accuracy: Accuracy | None) -> Row:
    rounds = costs[contestant.name]
    wall_s = Spread.of([cost.wall_s for cost in rounds])
    ratio = None
    if contestant.compared_to is not None:
        others = costs[contestant.compared_to]
        pairs = zip(rounds, others, strict=True)
        ratio = Spread.of([mine.wall_s / other.wall_s for mine, other in pairs])
    return Row(
        name=contestant.name,
        kind=contestant.kind,
        moved_bytes=contestant.moved_bytes,
        rounds=rounds,
        wall_s=wall_s,
        gb_per_s=contestant.moved_bytes / 1e9 / wall_s.p50,
        compared_to=contestant.compared_to,
        ratio=ratio,
        accuracy=accuracy,
    )
