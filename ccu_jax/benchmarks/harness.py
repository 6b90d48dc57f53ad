"""Processes that measure a window when they are asked to, by lines of JSON.

What is compared may need processes of its own: so many devices, so much memory. They
wait while others measure, so that all are measured in turn within one run.
"""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ccu_jax.errors import UserError

_THREADS = 32  # at least; with no more than cores, simulated devices starve each other
_CPU = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}


class Child:
    """A process of this project's Python: `python -m MODULE SPEC`.

    Args:
        title: what messages call it.
        module: whose process it is; it calls `serve`.
        spec: plain JSON that it is given.
        folder: for what it writes on the screen.
        devices: simulated devices; None: the machine's own CPU.
    """

    def __init__(  # noqa: D107  the class says it
        self,
        title: str,
        module: str,
        spec: dict[str, Any],
        folder: pathlib.Path,
        devices: int | None = None,
    ):
        self._title = title
        # A number of its own, as several may have one title.
        self._said = folder / f"{len(list(folder.glob('*.said')))}.said"
        self._errors = self._said.open("w", encoding="utf-8")
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            encoding="utf-8",
            env=_environment(devices),
        )

    def send(self, **what: Any) -> None:
        """Asks for something; `answer` waits for it."""
        try:
            self._process.stdin.write(json.dumps(what) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._fail()

    def answer(self) -> dict[str, Any]:
        """What came of the last request, or of starting.

        Raises:
            UserError: the process has ended; with its last words.
        """
        line = self._process.stdout.readline()
        if not line:
            self._fail()
        return json.loads(line)

    def ask(self, **what: Any) -> dict[str, Any]:
        """Asks, and waits for the answer."""
        self.send(**what)
        return self.answer()

    def close(self) -> None:
        """Ends the process: what it was asked for has been answered."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _fail(self):
        self._process.wait()
        told = self._said.read_text("utf-8", errors="replace").strip()
        why = told.splitlines()[-1] if told else f"code {self._process.returncode}"
        raise UserError(f"{self._title}: the process that measures ended: {why}")


def _environment(devices):
    environment = {**os.environ, **_CPU}
    if devices is None:
        return environment
    flag = "--xla_force_host_platform_device_count"
    others = [f for f in environment.get("XLA_FLAGS", "").split() if flag not in f]
    environment["XLA_FLAGS"] = " ".join([*others, f"{flag}={devices}"])
    environment["NPROC"] = str(max(_THREADS, 2 * devices))
    return environment


def free_port() -> int:
    """A port of this machine at which processes can meet."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def serve(prepare: Callable[[dict[str, Any]], Callable[..., dict[str, Any]]]) -> None:
    """The other end: the process itself, until nobody asks any more.

    Args:
        prepare: of the spec makes what answers; it says that it is ready first.
    """
    # Libraries write to the screen as well: what is asked for has a way of its own.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(answer):
        answers.write(json.dumps(answer, allow_nan=False) + "\n")
        answers.flush()

    try:
        answer = prepare(json.loads(sys.argv[1]))
        tell({"ready": True})
        for line in sys.stdin:
            tell(answer(**json.loads(line)))
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        code = 2
    except KeyboardInterrupt:
        code = 130
    except Exception:  # noqa: BLE001  its last line is shown
        traceback.print_exc()
        code = 1
    else:
        code = 0
    sys.stderr.flush()
    # An orderly exit would wait for the processes that it was joined to.
    os._exit(code)


def in_turn(
    calls: Sequence[Callable[[], Any]], windows: int, tell: Callable[..., None]
) -> list[list[Any]]:
    """What each call gave in each window; a first round, which warms up, apart."""
    found: list[list[Any]] = [[] for _ in calls]
    for window in range(windows + 1):
        places = range(len(calls))
        # Now the first and now the last first: noise that grows would favour one.
        for done, place in enumerate(places if window % 2 else reversed(places)):
            tell("measuring", window * len(calls) + done, (windows + 1) * len(calls))
            told = calls[place]()
            if window:
                found[place].append(told)
    tell("measuring", (windows + 1) * len(calls), (windows + 1) * len(calls))
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Low, median and high of what the windows gave, and all of it."""
    values = [float(value) for value in values]
    return {
        "low": min(values),
        "median": float(np.median(values)),
        "high": max(values),
        "windows": values,
    }


def screen(title: str) -> Callable[[str, int, int], None]:
    """Tells on stderr, now and then, how far a measurement is."""
    told = {"at": 0.0, "what": ""}

    def tell(what, done, total):
        now = time.monotonic()
        if what != told["what"] or done == total or now - told["at"] > 5:
            told.update(at=now, what=what)
            print(f"{title}: {what} {done:,}/{total:,}", file=sys.stderr, flush=True)

    return tell
