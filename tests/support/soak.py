"""A federation that is kept up as a supervisor does it, while anything in it is killed."""

from __future__ import annotations

import os
import random
import signal
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from support.processes import command_of, kill
from support.site import Site

# One of seven participants is killed about so often: each lives for some minutes.
KILL_S = (30.0, 90.0)
# A supervisor waits so long before it starts again what has ended.
RESTART_S = (0.0, 10.0)
SAMPLE_S = 10.0
# Imports, the first rounds and evaluations; and how long a process is watched after them at least.
WARM_UP_S, WATCHED_S = 120.0, 180.0
ALL, LAUNCHER = "all of it", "launcher"
PROGRAMS = ("flower-superlink", "flwr-serverapp")
_TICK_S = 0.2


class Holding(NamedTuple):
    """What a process holds: resident memory in MB, open descriptors, threads."""

    memory: float
    descriptors: int
    threads: int


@dataclass
class Life:
    """A process from its first sample to its last, in monotonic seconds."""

    kind: str
    program: str
    begun_s: float
    samples: list[tuple[float, Holding]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """How long it was seen."""
        return self.samples[-1][0] - self.begun_s

    def early_and_late(self) -> tuple[Holding, Holding] | None:
        """Medians of the first and of the last third after the warm-up; None if too short."""
        if self.seconds < WARM_UP_S + WATCHED_S:
            return None
        warm = [held for at_s, held in self.samples if at_s >= self.begun_s + WARM_UP_S]
        third = max(1, len(warm) // 3)
        return _median(warm[:third]), _median(warm[-third:])


@dataclass
class Soak:
    """Kills, restarts and watches the participants of ``site``, until all have ended with 0.

    Args:
        calm: says when nothing is to be killed any more.
        seed: of who is killed, how, when, and for how long it stays away.

    Attributes:
        kills: how often what was killed; exits: with which codes participants ended.
        lives: the processes that were seen, by their ids and the moment of their first sample.
    """

    site: Site
    calm: Callable[[], bool]
    seed: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    exits: Counter[str] = field(default_factory=Counter)
    lives: list[Life] = field(default_factory=list)

    def run(self) -> float:
        """Let it run; returns how long it took, in seconds."""
        rng, begun_s = random.Random(self.seed), time.monotonic()
        kill_s, sample_s = begun_s + rng.uniform(*KILL_S), begun_s
        again_s: dict[str, float] = {}
        running: dict[int, Life] = {}
        while not self._ended():
            now_s = time.monotonic()
            self._supervise(again_s, now_s, rng)
            if now_s >= sample_s:
                running = self._sample(running, now_s)
                sample_s = now_s + SAMPLE_S
            if now_s >= kill_s and not self.calm():
                self._kill(rng)
                kill_s = now_s + rng.uniform(*KILL_S)
            time.sleep(_TICK_S)
        return time.monotonic() - begun_s

    def _ended(self) -> bool:
        return all(program.process.poll() == 0 for program in self.site.programs.values())

    def _supervise(self, again_s: dict[str, float], now_s: float, rng: random.Random) -> None:
        for name, program in list(self.site.programs.items()):
            code = program.process.poll()
            if code in (None, 0):
                continue
            if name not in again_s:
                self.exits[f"{_kind(name)}: {code}"] += 1
                again_s[name] = now_s + rng.uniform(*RESTART_S)
            elif now_s >= again_s[name]:
                del again_s[name]
                self.site.start(name)

    def _kill(self, rng: random.Random) -> None:
        up = [n for n, program in self.site.programs.items() if program.process.poll() is None]
        name = rng.choice(sorted(up))
        what = ALL if _kind(name) == "client" else rng.choice((ALL, LAUNCHER, *PROGRAMS))
        leader = self.site.programs[name].pid
        if what == ALL:
            victims = [p for p, (n, _) in self._processes().items() if n == name]
        elif what == LAUNCHER:
            victims = [leader]
        else:
            victims = [p for p, found in self._processes().items() if found == (name, what)]
        if victims:
            self.kills[f"{_kind(name)}: {what}"] += 1
        for pid in victims:
            kill(pid, signal.SIGKILL)

    def _sample(self, running: dict[int, Life], now_s: float) -> dict[int, Life]:
        found: dict[int, Life] = {}
        for pid, (name, program) in self._processes().items():
            life = running.get(pid)
            if life is None or (life.kind, life.program) != (_kind(name), program):
                life = Life(_kind(name), program, now_s)
            if held := _held(pid):
                life.samples.append((now_s, held))
                found[pid] = life
                if len(life.samples) == 1:
                    self.lives.append(life)
        return found

    def _processes(self) -> dict[int, tuple[str, str]]:
        """The processes of participants that are up: whose they are, and what they run."""
        leaders = {program.pid: name for name, program in self.site.programs.items()}
        found = {}
        for pid in self.site.processes.running():
            above = next((leaders[p] for p in _ancestry(pid) if p in leaders), None)
            if above is not None:
                words = [Path(word).name for word in command_of(pid)]
                program = next((p for p in PROGRAMS if p in words), LAUNCHER)
                if program == LAUNCHER and pid not in leaders:
                    program = next((w for w in words if w.startswith(("fl", "ray"))), "other")
                found[pid] = (above, program)
        return found


def report(soak: Soak, seconds: float, intervals: int, loss: float) -> Iterator[str]:
    """The lines of a report in Markdown."""
    kills = sum(soak.kills.values())
    yield f"{intervals} intervals in {seconds / 60:.0f} min; {kills} kills; last loss {loss:.4f}."
    yield ""
    yield "| killed with SIGKILL | times |"
    yield "|---|---|"
    yield from (f"| {what} | {number} |" for what, number in sorted(soak.kills.items()))
    yield ""
    yield "| ended with exit code, and was started again | times |"
    yield "|---|---|"
    yield from (f"| {what} | {number} |" for what, number in sorted(soak.exits.items()))
    yield ""
    yield (
        "| process | seen | long enough to be judged | longest, min | memory, MB | descriptors | "
        "threads |"
    )
    yield "|---|---|---|---|---|---|---|"
    by_kind = defaultdict(list)
    for life in soak.lives:
        by_kind[life.kind, life.program].append(life)
    for (kind, program), lives in sorted(by_kind.items()):
        pairs = [pair for life in lives if (pair := life.early_and_late())]
        if not pairs:
            continue
        longest = max(life.seconds for life in lives) / 60
        spans = [
            f"{_worst(pairs, index)[0]:.0f} to {_worst(pairs, index)[1]:.0f}" for index in range(3)
        ]
        cells = [f"{kind}: {program}", str(len(lives)), str(len(pairs)), f"{longest:.0f}", *spans]
        yield f"| {' | '.join(cells)} |"


def _worst(pairs: list[tuple[Holding, Holding]], index: int) -> tuple[float, float]:
    """Where the late value exceeds the early one most."""
    return max(
        ((early[index], late[index]) for early, late in pairs), key=lambda two: two[1] - two[0]
    )


def _kind(name: str) -> str:
    return name.partition("-")[0]


def _median(held: list[Holding]) -> Holding:
    return Holding(
        statistics.median(one.memory for one in held),
        round(statistics.median(one.descriptors for one in held)),
        round(statistics.median(one.threads for one in held)),
    )


def _held(pid: int) -> Holding | None:
    """What a process holds; None if it has ended."""
    try:
        status = dict(
            line.split(":", 1)
            for line in Path(f"/proc/{pid}/status").read_text("ascii", "replace").splitlines()
        )
        descriptors = len(os.listdir(f"/proc/{pid}/fd"))
        return Holding(int(status["VmRSS"].split()[0]) / 1000, descriptors, int(status["Threads"]))
    except (OSError, KeyError):
        return None


def _ancestry(pid: int) -> Iterator[int]:
    """A process, the one that started it, and so on."""
    while pid > 1:
        yield pid
        try:
            status = Path(f"/proc/{pid}/status").read_text("ascii", "replace")
        except OSError:
            return
        pid = int(status.partition("PPid:\t")[2].partition("\n")[0])
