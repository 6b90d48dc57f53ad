"""Files that are damaged between two starts: repaired, or named with the remedy."""

import pathlib
import re
import shutil
import signal
import time

from tests.faults.runs import Run
from tests.faults.world import Case, Undisturbed, World

WAYS = ("flipped", "cut short", "emptied", "removed")

# What is damaged: files by pattern, in the folder of which run; "unfinished" is a
# finished one whose last method is to be run again, so that what it needs is read.
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
    """One file, damaged in one way."""
    name, way = drawn(case.number)
    pattern, state = TARGETS[name]
    undisturbed, more = STATES[state](case)
    # Times of writing say nothing of a file that was damaged: a disk keeps them.
    files = [path for path in sorted(case.workdir.glob(pattern)) if path.is_file()]
    files = [path for path in files if path.stat().st_size]
    assert files, f"no {pattern} in a run {state}"
    path = case.draw.choice(files)
    _damage(path, way, case.draw)
    case.faults.append(f"{name}: {way}")
    run = case.start(*more)
    run.wait()
    try:
        tries = 0
        while run.code() == 2 and tries < 3:
            _remedy(run.errors(), case.workdir, path)
            run, tries = case.start(*more), tries + 1
            run.wait()
        assert run.code() == 0, f"exit code {run.code()}: {run.errors()[-1200:]}"
        assert "Traceback" not in run.errors(), run.errors()[-1200:]
        if name == "finished parameters" and (told := _unusable(case.workdir, path)):
            _remedy(told, case.workdir, path)
            run = case.start(*more)
            assert run.wait() == 0, f"exit code {run.code()}: {run.errors()[-1200:]}"
        case.same(undisturbed)
    except AssertionError as error:
        place = path.relative_to(case.workdir)
        raise AssertionError(f"{place} {way}, {state}: {error}") from error


def drawn(number: int) -> tuple[str, str]:
    """What is damaged in which way in the case of a number."""
    names = list(TARGETS)
    way = WAYS[(number // len(names) + number) % len(WAYS)]
    return names[number % len(names)], way


def _damage(path: pathlib.Path, way: str, draw) -> None:
    content = bytearray(path.read_bytes())
    if way == "removed":
        return path.unlink()
    if way == "flipped":
        for _ in range(draw.choice((1, 3))):
            # One bit, which may leave valid text: of a number another one.
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    elif way == "cut short":
        del content[draw.randrange(len(content)) :]
    else:
        content.clear()
    path.write_bytes(content)


def _unusable(workdir: pathlib.Path, path: pathlib.Path) -> str:
    """What is told to who uses a model that no run had to read again, as its error."""
    from ccu_jax.errors import UserError
    from ccu_jax.inference import load_classifier

    method = path.relative_to(workdir).parts[1].rpartition("-")[0]
    try:
        load_classifier(workdir, method)
    except UserError as error:
        return f"error: {error}"
    return ""


def _remedy(told: str, workdir: pathlib.Path, path: pathlib.Path) -> None:
    """Does what the one line of an error says; it must name the file, or its place."""
    assert "Traceback" not in told, told[-1200:]
    lines = [line for line in told.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, f"{len(lines)} lines of errors: {told[-1200:]}"
    line = lines[0]
    named = [pathlib.Path(x.rstrip(".,:;)")) for x in re.findall(r"/\S+", line)]
    assert any(path.is_relative_to(one) for one in named), f"{path} not named: {line}"
    if there := re.search(r"remove (/\S+)", line):
        remove = [pathlib.Path(there[1].rstrip(".,:;)"))]
        if and_there := re.search(r"remove /\S+ and (/\S+)", line):
            remove.append(pathlib.Path(and_there[1].rstrip(".,:;)")))
    elif "remove it" in line or "remove this folder" in line:
        remove = named[:1]
    else:
        raise AssertionError(f"no remedy: {line}")
    for one in remove:
        # Never the whole folder: one file was damaged.
        assert workdir in one.parents, f"{one} is not of this run: {line}"
        shutil.rmtree(one) if one.is_dir() else one.unlink(missing_ok=True)


def _finished(case: Case) -> tuple[Undisturbed, tuple[str, ...]]:
    undisturbed = case.world.undisturbed(*case.world.audited)
    case.copied(undisturbed)
    _elsewhere(case.workdir, undisturbed.workdir)
    return undisturbed, case.world.audited


def _unfinished(case: Case):
    found = _finished(case)
    for pattern in ("stages/ccu_plus-0.json", "outputs/ccu_plus-0.npz"):
        (case.workdir / pattern).unlink()
    shutil.rmtree(case.workdir / "checkpoints" / "ccu_plus-0")
    for path in (case.workdir / "audits").glob("ccu_plus-*"):
        path.unlink()
    return found


def _in_a_method(case: Case):
    more = ("--methods", "ccu_plus")
    return _cut_off(case, more, "checkpoints/ccu_plus-0/steps*/[0-9]*/meta/metadata")


def _in_a_request(case: Case):
    done = "checkpoints/ccu_plus-0/steps*/request-2/params/*/meta/metadata"
    return _cut_off(case, case.world.streamed, done)


def _in_the_shadows(case: Case):
    return _cut_off(case, case.world.audited, "shadows/0/original-1-*.npz")


STATES = {
    "finished": _finished,
    "unfinished": _unfinished,
    "in a method": _in_a_method,
    "in a request": _in_a_request,
    "in the shadows": _in_the_shadows,
}


def _cut_off(case: Case, more: tuple[str, ...], pattern: str):
    """A run that was killed when it had come to a file; kept for the next case."""
    world = case.world
    case.copied_from(cut_off(world, more, pattern))
    return world.undisturbed(*more), more


def cut_off(
    world: World,
    more: tuple[str, ...],
    pattern: str,
    name: str = "plain",
) -> pathlib.Path:
    """The folder of a run that was killed when it had come to a file."""
    parts = [*more, name.replace(" ", "-")]
    folder = world.folder / "cut-off" / "_".join(x.strip("-") for x in parts)
    if folder.exists():
        return folder
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    new.parent.mkdir(parents=True, exist_ok=True)
    run = Run(world.argv(new, *more), folder.with_suffix(".log"))
    while not list(new.glob(pattern)):
        assert run.code() is None, f"it has never come to {pattern}: {run.errors()}"
        time.sleep(0.002)
    run.signal(signal.SIGKILL)
    assert run.wait(20) == -signal.SIGKILL
    new.rename(folder)
    return folder


def _elsewhere(workdir, before) -> None:
    """Nothing in a folder says where it lies, so that it may be moved."""
    for path in workdir.glob("stages/*.json"):
        assert str(before) not in path.read_text("utf-8"), path
