"""The digits study under docker compose: build, up, crash a worker, down, up again, complete.

``python -m benchmarks.compose_study --write``; ``--trials 4`` for a short run. Its volumes are
deleted at the end, except with ``--keep``.
"""

import json
import re
import sys
import time
from typing import Any

from benchmarks.common import DIGITS_STUDY, parser, publish
from tests.e2e.stack import Engine, Stack
from tests.e2e.study import wait_until


class Log:
    """What was done and seen, with the time."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._started = time.monotonic()

    def say(self, text: str) -> None:
        line = f"[{time.monotonic() - self._started:6.0f} s] {text}"
        self.lines.append(line)
        print(line, file=sys.stderr, flush=True)


def states(stack: Stack) -> str:
    """What each container does."""
    rows = stack.compose("ps", "--all", "--format", "json").stdout.strip()
    # One object a line, or in older versions one list.
    listed = (
        json.loads(rows) if rows.startswith("[") else [json.loads(r) for r in rows.split("\n")]
    )
    return ", ".join(sorted(f"{row['Service']} {row['State']}" for row in listed))


def said(stack: Stack, words: str) -> str:
    """The last that the launcher said with these words in it."""
    lines = [line for line in stack.logs("launcher").splitlines() if words in line]
    return str(json.loads(lines[-1].partition("|")[2])["message"]) if lines else ""


def ended(stack: Stack) -> int:
    """Trials that have ended, by what the launcher says."""
    found = re.search(r"trials (\d+)/", said(stack, "running:"))
    return int(found[1]) if found else 0


def main() -> None:
    """Run and publish."""
    options = parser(__doc__)
    options.add_argument("--trials", type=int, default=16)
    options.add_argument("--workers", type=int, default=2)
    options.add_argument("--keep", action="store_true", help="leave it running at the end")
    given = options.parse_args()
    engine = Engine.find()
    if isinstance(engine, str):
        sys.exit(engine)
    stack = Stack(
        engine, str(DIGITS_STUDY), options=f"--trials {given.trials}", project="bdense-study"
    )
    stack.workers = given.workers
    log = Log()
    try:
        answer = run(stack, given.trials, log)
        publish("compose_study", body(answer, log), write=given.write, threads="1 thread a worker")
    finally:
        if given.keep:
            print(f"left running: http://127.0.0.1:{stack.port}")
        else:
            stack.down("--volumes")
            engine.end()


def run(stack: Stack, trials: int, log: Log) -> dict[str, Any]:
    """The whole story; what `best --json` answers at its end."""
    log.say("build")
    stack.build()
    log.say(f"up, {stack.workers} workers")
    stack.up()
    # An engine may have another image under that name than Docker's.
    version = stack.compose("exec", "-T", "postgres", "postgres", "--version").stdout.strip()
    log.say(f"the image postgres:17 is {version}")
    wait_until(lambda: ended(stack) >= 2, seconds=1800, what="two trials")
    log.say(said(stack, "running:"))
    log.say(f"before: {states(stack)}")
    log.say("a ray-worker's first process is killed (SIGKILL)")
    victim = stack.containers("ray-worker")[0]
    stack.crash(victim)
    wait_until(
        lambda: stack.inspect(victim)[0]["RestartCount"] > 0, seconds=120, what="its restart"
    )
    log.say("its container was started again")
    wait_until(lambda: ended(stack) >= trials // 2, seconds=1800, what="half of the trials")
    log.say(said(stack, "running:"))
    stack.down()
    log.say("down, then up again")
    stack.up()
    wait_until(lambda: stack.launcher_status()[0] == "exited", seconds=3600, what="the end")
    status = stack.launcher_status()[1]
    log.say(f"the launcher has ended with {status}")
    assert status == 0, stack.logs("launcher")
    log.say(f"after: {states(stack)}")
    log.say(said(stack, "carrying on"))
    answer = stack.search("best")
    assert answer["trials"]["complete"] == trials, answer
    doctor = stack.compose(
        *("run", "--rm", "--no-deps", "launcher", "launch.sh", "doctor", answer["study"]),
        check=False,
    )
    log.say(f"doctor: exit status {doctor.returncode}")
    log.lines += ["", *doctor.stdout.strip().splitlines()]
    return answer


def body(answer: dict[str, Any], log: Log) -> str:
    """The log, and the figures."""
    best, baselines = answer["best"], answer["baselines"]
    figures = {
        "trials": answer["trials"],
        "plain SFD": baselines["sfd"]["fid"],
        "uniform weights": baselines["uniform"]["fid"],
        "best": {key: best[key] for key in ("number", "a", "fid")},
    }
    shown = "\n".join(log.lines)
    return f"```\n{shown}\n```\n\n```json\n{json.dumps(figures, indent=1)}\n```"


if __name__ == "__main__":
    main()
