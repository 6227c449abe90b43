"""Any history of runs, kills, power cuts, damage and touched sources ends with the right bytes."""

from __future__ import annotations

import os
import random
import shutil

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from optimer_engine import verify_output
from optimer_engine.errors import OutputError, RecipeError
from tests.faults.disk import Dying, Failing, Killed, Recording, survivors


def machine(case):
    """A class of machines over one case, made once."""
    paths = [folder / "model.safetensors" for folder in case.sources]
    sources = {path: path.stat() for path in paths}

    class Machine(RuleBasedStateMachine):
        def __init__(self):
            super().__init__()
            self.root = case.folder / "machine"
            shutil.rmtree(self.root, ignore_errors=True)
            self.root.mkdir()
            self.out, self.partial = self.root / "out", self.root / "out.partial"
            self.touched = self.discards = False

        def teardown(self):
            self.discards = True
            self.run_to_the_end()
            verify_output(self.out, full=False)

        def attempt(self, disk=None):
            """Run; sources touched since the last run are refused until all is dropped."""
            try:
                case.run(self.out, disk, discard=self.discards and not self.out.exists())
            except RecipeError as error:
                assert self.touched, error
                assert "differs in files" in str(error)
                return
            finally:
                self.discards = False
            self.touched = False

        @rule(at=st.integers(0, 200))
        def killed(self, at):
            with pytest.raises(Killed):
                self.attempt(Dying(at))
                raise Killed  # it came to the end

        @rule(at=st.integers(0, 200), forever=st.booleans())
        def disk_fails(self, at, forever):
            try:
                self.attempt(Failing(at, 5, forever))
            except OutputError:
                return

        @rule(at=st.integers(0, 200), chance=st.sampled_from((0.0, 0.5)), seed=st.integers(0, 99))
        def power_is_cut(self, at, chance, seed):
            """Of a run that starts with nothing, so that the log knows everything."""
            for path in (self.out, self.partial):
                shutil.rmtree(path, ignore_errors=True)
            disk = Recording(self.root)
            self.discards = True
            self.attempt(disk)
            for path in (self.out, self.partial):
                shutil.rmtree(path, ignore_errors=True)
            self.touched = False
            survivors(disk.log[:at], self.root, chance, seed)

        @rule()
        def run_to_the_end(self):
            self.attempt()

        @rule()
        def dropped(self):
            self.discards = True

        @precondition(lambda self: self.partial.exists())
        @rule(seed=st.integers(0, 9999))
        def damaged(self, seed):
            """A bit flips, or a file is cut: anywhere in what is unfinished."""
            rng = random.Random(seed)
            files = [f for f in sorted(self.partial.iterdir()) if f.stat().st_size]
            if not files:
                return
            file = rng.choice(files)
            content = bytearray(file.read_bytes())
            at = rng.randrange(len(content))
            if rng.random() < 0.7:
                content[at] ^= 1 << rng.randrange(8)
            else:
                del content[at:]
            file.write_bytes(content)

        @rule(number=st.integers(0, len(sources) - 1), later=st.integers(1, 10**9))
        def source_touched(self, number, later):
            path = list(sources)[number]
            found = sources[path]
            os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + later))
            self.touched = True

        @invariant()
        def absent_or_complete(self):
            case.check_absent_or_complete(self.out)

    return Machine


def play(case, examples, steps):
    from hypothesis.stateful import run_state_machine_as_test

    wanted = settings(
        max_examples=examples, stateful_step_count=steps, deadline=None, database=None,
        derandomize=True, suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    run_state_machine_as_test(machine(case), settings=wanted)


def test_any_history_ends_with_the_right_bytes(make_case):
    play(make_case("single"), 10, 12)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["single", "shards"])
def test_any_long_history_ends_with_the_right_bytes(make_case, kind):
    play(make_case(kind), 200, 30)
