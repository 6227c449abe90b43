"""Start a program, wait for it, print its cost as JSON: `python -I -S launch.py LOG PROGRAM ...`

A process of its own, small and free of imports, because Linux counts the memory that the parent
held at the fork into the child's `ru_maxrss`: started from a process that has loaded torch, every
program would seem to need as much. The program's output goes to the file LOG.
(No pathlib here: the fewer imports, the smaller the launcher.)

Printed: exit_code, wall_s, cpu_s (user and system), peak_rss_bytes (`ru_maxrss`), and the largest
anonymous and file-backed resident sizes seen in /proc/PID/status every 5 ms. The two need not peak
at the same time.
"""

import json
import os
import subprocess
import sys
import threading
import time

POLL_S = 0.005


def main() -> None:
    """Run the program named by the arguments."""
    log, *program = sys.argv[1:]
    peaks = {"RssAnon:": 0, "RssFile:": 0}
    ended = threading.Event()

    def poll(pid: int) -> None:
        while not ended.wait(POLL_S):
            try:
                with open(f"/proc/{pid}/status") as status:  # noqa: PTH123
                    lines = status.readlines()
            except OSError:
                return
            for line in lines:
                key, _, value = line.partition("\t")
                if key in peaks:
                    peaks[key] = max(peaks[key], int(value.split()[0]) * 1024)

    with open(log, "wb") as output:  # noqa: PTH123
        started = time.perf_counter()
        process = subprocess.Popen(
            program, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        poller = threading.Thread(target=poll, args=(process.pid,))
        poller.start()
        _, status, usage = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - started
    ended.set()
    poller.join()
    cost = {
        "exit_code": os.waitstatus_to_exitcode(status),
        "wall_s": wall_s,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_rss_bytes": usage.ru_maxrss * 1024,
        "peak_anon_bytes": peaks["RssAnon:"],
        "peak_file_bytes": peaks["RssFile:"],
    }
    print(json.dumps(cost))


if __name__ == "__main__":
    main()
