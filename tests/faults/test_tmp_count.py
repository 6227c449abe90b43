from tests.faults.test_kill import *
def test_c(case):
    print("COUNT", case.kind, case.effects())
def test_k(write_checkpoint, tmp_path):
    print("PARTIALS", kill_at_random(write_checkpoint, tmp_path, 20))
