"""Files that are damaged between two starts are recreated, or named with the remedy."""

import pathlib
import re
import shutil
import signal
import time

from ccu_jax.errors import UserError
from ccu_jax.inference import load_classifier
from tests.faults.runs import Run
from tests.faults.world import Case, Undisturbed, World

DAMAGES = ("flipped", "truncated", "emptied", "removed")

# Files by pattern, and the state of the run that has them; "unfinished" is a finished
# run whose last method is to be run again, so that its inputs are read.
TARGETS = {
    "records of stages": ("stages/*.json", "finished"),
    "results": ("results.json", "finished"),
    "outputs": ("outputs/*.npz", "finished"),
    "outputs of the original": ("outputs/original-0.npz", "unfinished"),
    "finished parameters": ("checkpoints/*/params/**/*", "finished"),
    "original's parameters": ("checkpoints/original-0/params/**/*", "unfinished"),
    "feature store": ("checkpoints/original-0/features/*", "unfinished"),
    "steps of a method": ("checkpoints/*/steps*/**/*", "in a method"),
    "receipts of requests": ("checkpoints/*/steps*/request-*/**/*", "in a request"),
    "records of audits": ("audits/*.json", "finished"),
    "audit": ("audit.json", "finished"),
    "shadows": ("shadows/**/*", "in the shadows"),
    "unlearn sets": ("unlearn_sets/*", "unfinished"),
    "configuration": ("config.json", "finished"),
    "prepared data": ("data/*", "unfinished"),
    "events": ("events.jsonl", "unfinished"),
}


def damaged(case: Case) -> None:
    """One file is damaged in one way."""
    name, damage = choose_damage(case.number)
    pattern, state = TARGETS[name]
    undisturbed, flags = _STATES[state](case)
    files = [path for path in sorted(case.workdir.glob(pattern)) if path.is_file()]
    files = [path for path in files if path.stat().st_size]
    assert files, f"no {pattern} in a run {state}"
    path = case.rng.choice(files)
    _damage(path, damage, case.rng)
    case.faults.append(f"{name}: {damage}")
    run = case.start(*flags)
    run.wait()
    try:
        for _ in range(3):
            if run.code() != 2:
                break
            _apply_remedy(run.errors(), case.workdir, path)
            run = case.start(*flags)
            run.wait()
        _assert_succeeded(run)
        if name == "finished parameters" and (message := _load_error(case, path)):
            _apply_remedy(message, case.workdir, path)
            run = case.start(*flags)
            run.wait()
            _assert_succeeded(run)
        case.assert_same(undisturbed)
    except AssertionError as error:
        place = path.relative_to(case.workdir)
        raise AssertionError(f"{place} {damage}, {state}: {error}") from error


def choose_damage(number: int) -> tuple[str, str]:
    """Returns target and damage of the case of a number."""
    names = list(TARGETS)
    damage = DAMAGES[(number // len(names) + number) % len(DAMAGES)]
    return names[number % len(names)], damage


def _assert_succeeded(run):
    assert run.code() == 0, f"exit code {run.code()}: {run.errors()[-1200:]}"
    assert "Traceback" not in run.errors(), run.errors()[-1200:]


def _damage(path: pathlib.Path, damage: str, rng) -> None:
    """Damages a file; the disk keeps its modification time."""
    content = bytearray(path.read_bytes())
    if damage == "removed":
        return path.unlink()
    if damage == "flipped":
        for _ in range(rng.choice((1, 3))):
            # One bit, which may leave valid text with another number.
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif damage == "truncated":
        del content[rng.randrange(len(content)) :]
    else:
        content.clear()
    path.write_bytes(content)


def _load_error(case: Case, path: pathlib.Path) -> str:
    """Returns the error of loading a model that no run had to read, or ""."""
    method = path.relative_to(case.workdir).parts[1].rpartition("-")[0]
    try:
        load_classifier(case.workdir, method)
    except UserError as error:
        return f"error: {error}"
    return ""


def _apply_remedy(printed: str, workdir: pathlib.Path, path: pathlib.Path) -> None:
    """Removes what the error says; it must name the damaged file or its folder."""
    assert "Traceback" not in printed, printed[-1200:]
    lines = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, f"{len(lines)} lines of errors: {printed[-1200:]}"
    line = lines[0]
    named = [pathlib.Path(x.rstrip(".,:;)")) for x in re.findall(r"/\S+", line)]
    assert any(path.is_relative_to(one) for one in named), f"{path} not named: {line}"
    if match := re.search(r"remove (/\S+)(?: and (/\S+))?", line):
        to_remove = [pathlib.Path(x.rstrip(".,:;)")) for x in match.groups() if x]
    elif "remove it" in line or "remove this folder" in line:
        to_remove = named[:1]
    else:
        raise AssertionError(f"no remedy: {line}")
    for one in to_remove:
        # Never the whole folder: one file was damaged.
        assert workdir in one.parents, f"{one} is not of this run: {line}"
        shutil.rmtree(one) if one.is_dir() else one.unlink(missing_ok=True)


def _finished(case: Case) -> tuple[Undisturbed, tuple[str, ...]]:
    undisturbed = case.world.undisturbed(*case.world.audited)
    case.copy_from(undisturbed.workdir)
    # A folder can be moved: no file contains its path.
    for path in case.workdir.glob("stages/*.json"):
        assert str(undisturbed.workdir) not in path.read_text("utf-8"), path
    return undisturbed, case.world.audited


def _unfinished(case: Case):
    run = _finished(case)
    for pattern in ("stages/ccu_plus-0.json", "outputs/ccu_plus-0.npz"):
        (case.workdir / pattern).unlink()
    shutil.rmtree(case.workdir / "checkpoints" / "ccu_plus-0")
    for path in (case.workdir / "audits").glob("ccu_plus-*"):
        path.unlink()
    return run


def _killed_at(flags: str | tuple[str, ...], pattern: str):
    """Returns a state: a run that was killed when a file had appeared."""

    def make(case: Case):
        chosen = getattr(case.world, flags) if isinstance(flags, str) else flags
        case.copy_from(kill_at_file(case.world, chosen, pattern))
        return case.world.undisturbed(*chosen), chosen

    return make


_STEPS = "checkpoints/ccu_plus-0/steps*"
_STATES = {
    "finished": _finished,
    "unfinished": _unfinished,
    "in a method": _killed_at(
        ("--methods", "ccu_plus"), f"{_STEPS}/[0-9]*/meta/metadata"
    ),
    "in a request": _killed_at(
        "streamed", f"{_STEPS}/request-2/params/*/meta/metadata"
    ),
    "in the shadows": _killed_at("audited", "shadows/0/original-1-*.npz"),
}


def kill_at_file(
    world: World, flags: tuple[str, ...], pattern: str, name: str = "plain"
) -> pathlib.Path:
    """Returns the folder of a run that was killed when a file had appeared."""
    parts = [*flags, name.replace(" ", "-")]
    folder = world.folder / "killed" / "_".join(x.strip("-") for x in parts)
    if folder.exists():
        return folder
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    new.parent.mkdir(parents=True, exist_ok=True)
    run = Run(world.argv(new, *flags), folder.with_suffix(".log"))
    while not list(new.glob(pattern)):
        assert run.code() is None, f"{pattern} never appeared: {run.errors()}"
        time.sleep(0.002)
    run.signal(signal.SIGKILL)
    assert run.wait(20) == -signal.SIGKILL
    new.rename(folder)
    return folder
