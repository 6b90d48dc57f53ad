"""Timing windows in turn, in this process or in child processes that answer JSON.

A child process gives a measurement its own threads and memory, and stays idle while
another one is measured.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from ccu_jax.errors import UserError

_PROGRESS_EVERY_S = 2.0


class Progress:
    """Prints progress, rate and time left of a benchmark to stderr."""

    def __init__(self, title: str):
        """Starts every line with `title`."""
        self._title, self._stage = title, ""
        self._printed_s = self._started_s = time.monotonic()
        self._first = 0

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Prints at the start and end of a stage, else every two seconds."""
        now = time.monotonic()
        is_new = stage != self._stage
        if is_new:
            self._stage, self._started_s, self._first = stage, now, done
        elif done != total and now - self._printed_s < _PROGRESS_EVERY_S:
            return
        self._printed_s = now
        words = [f"{self._title}: {stage} {done:,}/{total:,}"]
        if done > self._first and now > self._started_s:
            rate = (done - self._first) / (now - self._started_s)
            words.append(f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2g}/s")
            if done < total:
                words.append(f"{(total - done) / rate:,.0f} s left")
        print(", ".join(words), file=sys.stderr, flush=True)


def measure_in_turn(
    calls: Mapping[Any, Callable[[], Any]], windows: int, progress: Progress
) -> dict[Any, list[Any]]:
    """Calls everything once a window, so that load on the machine hits all alike.

    Args:
        calls: functions by name. Each measures one window and returns its numbers.
        windows: number of windows. One more comes first, to warm up, and is dropped.
        progress: receives the number of finished calls.

    Returns:
        The results of every function, window by window.
    """
    results: dict[Any, list[Any]] = {name: [] for name in calls}
    total = (windows + 1) * len(calls)
    for window in range(windows + 1):
        # Alternate the order: steadily growing load would favour the first.
        names = list(calls) if window % 2 else list(calls)[::-1]
        for position, name in enumerate(names):
            progress("measuring", window * len(calls) + position, total)
            result = calls[name]()
            if window:
                results[name].append(result)
    progress("measuring", total, total)
    return results


def summarize(values: Sequence[float]) -> dict[str, Any]:
    """Returns `median`, `low` and `high` of the windows, and the windows."""
    values = [float(value) for value in values]
    return {
        "median": statistics.median(values),
        "low": min(values),
        "high": max(values),
        "windows": values,
    }


def median_ratio(a: Mapping[str, Any] | None, b: Mapping[str, Any] | None) -> float:
    """Returns the median ratio of two summaries window by window; NaN if one lacks."""
    if a is None or b is None:
        return float("nan")
    pairs = zip(a["windows"], b["windows"], strict=True)
    return statistics.median(x / y for x, y in pairs)


def memory_mib(field: str) -> float | None:
    """Returns a field of /proc/self/status in MiB, such as VmRSS; None off Linux."""
    try:
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    values = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return int(values[0]) / 1024 if values else None


class Child:
    """A Python process that runs `serve` and answers requests.

    Args:
        title: what error messages call it.
        module: run as `python -m module SPEC`.
        spec: plain JSON that the module's `serve` receives.
        folder: where its stderr is written.
        environment: variables added to this process's own.
    """

    def __init__(
        self,
        title: str,
        module: str,
        spec: dict[str, Any],
        folder: pathlib.Path,
        environment: Mapping[str, str],
    ):
        """Starts the process; the first `answer` says that it is ready."""
        self._title = title
        self._log = folder / f"child-{len(list(folder.glob('child-*')))}.log"
        with self._log.open("w", encoding="utf-8") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, json.dumps(spec)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                encoding="utf-8",
                env={**os.environ, **environment},
            )

    def send(self, **request: Any) -> None:
        """Sends a request; `answer` waits for its result."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._fail()

    def answer(self) -> dict[str, Any]:
        """Returns the result of the last request.

        Raises:
            UserError: the process has ended; quotes the last line of its log.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return json.loads(line) if line else self._fail()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Sends a request and returns its result."""
        self.send(**request)
        return self.answer()

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()

    def _fail(self) -> NoReturn:
        self._process.wait()
        log = self._log.read_text("utf-8", errors="replace").strip().splitlines()
        reason = log[-1] if log else f"exit code {self._process.returncode}"
        raise UserError(f"{self._title}: the measuring process ended: {reason}")


def serve(prepare: Callable[[dict[str, Any]], Callable[..., dict[str, Any]]]) -> None:
    """Runs the child's side: answers requests until stdin closes.

    Args:
        prepare: receives the spec and returns the function that answers requests.
    """
    # Libraries print to stdout too, so the answers get a descriptor of their own.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def reply(result: dict[str, Any]) -> None:
        print(json.dumps(result), file=answers, flush=True)

    code = 0
    try:
        answer = prepare(json.loads(sys.argv[1]))
        reply({"ready": True})
        for line in sys.stdin:
            reply(answer(**json.loads(line)))
    except UserError as error:
        print(error, file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    except Exception:
        traceback.print_exc()
        code = 1
    sys.exit(code)
