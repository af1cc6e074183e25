"""One run of benchmarks, in groups of rows: a group is one op, size, dtype and pass, with every provider."""

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from .. import problem_of
from . import measure, memory
from .problem import BACKWARD, Instance, Problem, Provider, Size, bind_torch, label

SLOWEST = 40.0  # a call that takes more seconds, including compilation, is left out
ONCE = 5.0  # a call that takes more seconds is not repeated
Row = dict[str, object]


class Group(NamedTuple):
    name: str
    problem: Problem
    size: Size
    dtype: torch.dtype
    what: str

    @property
    def key(self) -> tuple:
        return self.problem.op, list(self.size), str(self.dtype).removeprefix("torch."), self.what

    def __str__(self):
        return f"{self.name} {label(self.size)} {self.what}"


@dataclass
class Session:
    """What is measured, and how long."""

    names: Sequence[str]
    device: str = "cpu"
    sizes: Sequence[Size] | None = None  # in place of the problems' own
    providers: Sequence[str] | None = None  # in addition to ivfast, which is always included
    implementations: Sequence[str] | None = None
    quick: bool = False
    deadline: float = math.inf  # of time.monotonic()
    done: Callable[[Group], bool] = lambda group: False
    step: Callable[[str], None] = lambda text: None  # told before each provider
    limits: dict[str, float] = field(default_factory=dict)
    missing: list[Row] = field(default_factory=list)
    not_started: list[str] = field(default_factory=list)
    _seen: dict[tuple, tuple[float, float]] = field(default_factory=dict)  # what a call took, and its cost

    def groups(self) -> list[Group]:
        """The groups to run, with the long sizes of every op last."""
        found = []
        for long in (False, True):
            for name in self.names:
                p = problem_of(name)
                more = p.gpu_sizes if self.device == "cuda" else ()
                sizes = self.sizes if self.sizes and not long else p.long_sizes if long else (*p.sizes, *more)
                if long and (self.sizes or self.quick):
                    continue
                dtypes = p.dtypes if self.device == "cuda" else p.dtypes[:1]
                found += [Group(name, p, s, t, what) for s in sizes for t in dtypes for what in p.passes]
        return [group for group in found if not self.done(group)]

    def chosen(self, p: Problem) -> list[Provider]:
        return [
            provider
            for provider in p.providers(self.device, self.implementations)
            if not self.providers or provider.name in (*self.providers, "ivfast")
        ]

    def steps(self) -> int:
        return sum(len(self.chosen(group.problem)) for group in self.groups())

    def run(self) -> Iterator[tuple[Group, list[Row]]]:
        """The rows of each group as soon as they are measured."""
        self.step("limits")
        self.limits |= measure.limits(self.device, self.quick)  # in place: the results hold it
        absent = self._absent()
        instance = None
        for group in self.groups():
            if time.monotonic() > self.deadline:
                self.not_started.append(str(group))
                continue
            drawn = instance and (instance.problem, instance.size, instance.dtype)
            if drawn != group[1:4]:
                instance = None
                gc.collect()
                instance = Instance(group.problem, group.size, group.dtype, self.device)
            yield group, self._group(group, instance, absent)

    def _absent(self) -> set[tuple[str, str]]:
        """Records the providers that are not available here, with the reason."""
        for name in self.names:
            p = problem_of(name)
            for provider in self.chosen(p):
                reason = p.missing(provider, self.device)
                if reason:
                    self.missing.append({"op": p.op, "provider": provider.name, "reason": reason})
        return {(row["op"], row["provider"]) for row in self.missing}

    def _group(self, group: Group, instance: Instance, absent: set[tuple[str, str]]) -> list[Row]:
        torch.compiler.reset()
        rows, calls, single = {}, {}, {}
        for provider in self.chosen(group.problem):
            self.step(f"{group}  {provider.name}")
            if (group.problem.op, provider.name) in absent:
                continue
            row = rows[provider] = self._row(group, provider)
            reason = self.refused(group, provider)
            if reason:
                row["reason"] = reason
                continue
            try:
                call, seconds, row["error"] = self.checked(group, provider, instance)
                if not row["error"] <= instance.allowed(provider):
                    row["reason"] = f"wrong: error {row['error']:.1e}, allowed {instance.allowed(provider):.0e}"
                    row["wrong"] = True
                    continue
                if self.device == "cuda":
                    row["peak_bytes"] = measure.peak_on_gpu(call) if provider.bind is bind_torch else None
            except Exception as error:
                if "CUDA error" in str(error):
                    raise  # the device is lost to this process
                row["reason"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
                continue
            if seconds > ONCE:
                single[provider] = measure.Timing(seconds, seconds, 1, 1)
            else:
                calls[provider] = call, seconds
        cuda = self.device == "cuda"
        timings = single | measure.in_turns(calls, 0.1 if self.quick else 0.6, cuda)
        for provider, timing in timings.items():
            row = rows[provider]
            row |= {"us": timing.median * 1e6, "least_us": timing.least * 1e6}
            row |= {"rounds": timing.rounds, "calls": timing.calls}
            self._seen[group.name, provider.name, group.what] = timing.median, self._cost(group)
            name, least = measure.bound(self.limits, group.problem.work(group.size, group.what),
                                        instance.bytes(group.what), group.what)  # fmt: skip
            row |= {"bound": name, "share": least / timing.median}
            if cuda and provider in calls and timing.median < 0.02 and not provider.packages:
                with provider.forced():
                    seconds = measure.on_device(calls[provider][0])
                row["device_us"] = seconds and seconds * 1e6
        return list(rows.values())

    def _row(self, group: Group, provider: Provider) -> Row:
        op, size, dtype, what = group.key
        row = {"op": op, "size": size, "dtype": dtype, "pass": what, "provider": provider.name, "kind": provider.kind}
        return row | ({"served": group.problem.served(self.device)} if provider.kind == "ivfast" else {})

    def _cost(self, group: Group) -> float:
        return group.problem.work(group.size, group.what) or math.prod(group.size)

    def expected(self, group: Group, provider: Provider) -> float:
        """Seconds of a call, extrapolated from the provider's last size."""
        seconds, cost = self._seen.get((group.name, provider.name, group.what), (0.0, 1.0))
        return seconds * self._cost(group) / cost

    def refused(self, group: Group, provider: Provider) -> str | None:
        """Why a call is not tried: memory or time."""
        needs, free = provider.needs(group.size, group.what, group.dtype), measure.free_memory(self.device)
        if needs > 0.8 * free:
            return f"needs {needs / 1e9:.0f} GB, {free / 1e9:.0f} GB is free"
        seconds = self.expected(group, provider)
        if seconds * (3 if provider.compiles else 1) > SLOWEST:  # compiled, called again, timed
            return f"about {seconds:.0f} s per call"
        return "no time left" if time.monotonic() > self.deadline else None

    def checked(self, group: Group, provider: Provider, instance: Instance):
        """The call to time, the seconds that it last took, and its error."""
        with provider.forced():
            call = instance.bind(provider, group.what)
            first = time.perf_counter()
            results = (instance.bind(provider, group.what, constants=True) if instance.constants else call)()
            if self.device == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - first
            error = 0.0 if provider.kind == "floor" else instance.error(results)
            del results
            right = error <= instance.allowed(provider)
            if right and (seconds < ONCE or provider.compiles or instance.constants):
                call()
                seconds = measure.clock(call, 1, self.device == "cuda")
        return call, seconds, error

    def memory(self, rows: list[Row]) -> Iterator[tuple[str, str]]:
        """Fills in missing peak memory of the timed rows; yields each op and provider before its process starts."""
        todo: dict[tuple[str, str], list[Row]] = {}
        for row in rows:
            if row.get("us") and "peak_bytes" not in row and row["us"] < 15e6:
                todo.setdefault((row["op"], row["provider"]), []).append(row)
        for (op, provider), wanted in todo.items():
            if time.monotonic() > self.deadline:
                self.not_started.append(f"{op} {provider}'s peak memory")
                continue
            yield op, provider
            name = next(n for n in self.names if problem_of(n).op == op)
            wanted.sort(key=lambda row: (math.prod(row["size"]), row["pass"] == BACKWARD))
            jobs = [{"size": row["size"], "what": row["pass"], "warm": row["us"] < 2e6} for row in wanted]
            timeout = max(10.0, min(300.0, self.deadline - time.monotonic()))
            for job in memory.measured(name, provider, jobs, torch.get_num_threads(), timeout):
                row = next(r for r in wanted if r["size"] == job["size"] and r["pass"] == job["what"])
                row["peak_bytes"] = job["peak_bytes"]
            for row in wanted:
                row.setdefault("peak_bytes", None)
