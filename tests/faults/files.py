"""Damages files between two starts: a run recreates them or names the remedy."""

import pathlib
import re
import shutil

from ccu_jax.errors import UserError
from ccu_jax.inference import load_classifier
from tests.faults.world import METHOD_FLAGS, Case, Undisturbed

DAMAGES = ("flipped", "truncated", "emptied", "removed")

# By name: a pattern of files, and a state of the run in which they exist; "unfinished"
# is a finished run whose last method runs again, so that its inputs are read.
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


def damage_file(case: Case) -> None:
    """Damages one file of a run and checks that the run recovers."""
    name, damage = choose_damage(case.number)
    pattern, state = TARGETS[name]
    undisturbed, flags = _copy_run(case, state)
    paths = sorted(path for path in case.workdir.glob(pattern) if path.is_file())
    files = [path for path in paths if path.stat().st_size]
    assert files, f"no {pattern} in a run {state}"
    path = case.rng.choice(files)
    _damage(path, damage, case.rng)
    case.faults.append(f"{name}: {damage}")
    try:
        _run_with_remedies(case, flags, path)
        if name == "finished parameters" and (message := _load_error(case, path)):
            _apply_remedy(message, case.workdir, path)
            _run_with_remedies(case, flags, path)
        case.assert_same(undisturbed)
    except AssertionError as error:
        place = path.relative_to(case.workdir)
        raise AssertionError(f"{place} {damage}, {state}: {error}") from error


def _run_with_remedies(case: Case, flags: tuple[str, ...], path: pathlib.Path) -> None:
    """Runs the command; applies the remedies in up to three error messages."""
    for _ in range(4):
        run = case.start(*flags)
        if run.wait() != 2:
            break
        _apply_remedy(run.errors(), case.workdir, path)
    assert run.exit_code() == 0, f"exit code {run.exit_code()}: {run.errors()}"
    assert "Traceback" not in run.errors(), run.errors()


def choose_damage(number: int) -> tuple[str, str]:
    """Returns a key of TARGETS and one of DAMAGES for a case number."""
    names = list(TARGETS)
    damage = DAMAGES[(number // len(names) + number) % len(DAMAGES)]
    return names[number % len(names)], damage


def _damage(path: pathlib.Path, damage: str, rng) -> None:
    """Damages a file in one of the ways in DAMAGES."""
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
    """Loads the model that `path` belongs to; returns the error message or ""."""
    method = path.relative_to(case.workdir).parts[1].rpartition("-")[0]
    try:
        load_classifier(case.workdir, method)
    except UserError as error:
        return f"error: {error}"
    return ""


def _apply_remedy(errors: str, workdir: pathlib.Path, path: pathlib.Path) -> None:
    """Removes what the error tells to; it must name the damaged file or its folder."""
    assert "Traceback" not in errors, errors
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, f"{len(lines)} lines of errors: {errors}"
    line = lines[0]
    paths = [pathlib.Path(x.rstrip(".,:;)")) for x in re.findall(r"/\S+", line)]
    assert any(path.is_relative_to(x) for x in paths), f"{path} not named: {line}"
    if match := re.search(r"remove (/\S+)(?: and (/\S+))?", line):
        to_remove = [pathlib.Path(x.rstrip(".,:;)")) for x in match.groups() if x]
    else:
        assert "remove it" in line or "remove this folder" in line, f"no remedy: {line}"
        to_remove = paths[:1]
    for target in to_remove:
        # Never the whole folder: one file was damaged.
        assert workdir in target.parents, f"{target} is outside the folder: {line}"
        shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)


def _copy_run(case: Case, state: str) -> tuple[Undisturbed, tuple[str, ...]]:
    """Copies a run in the given state; returns the undisturbed run and its flags."""
    audit_flags, steps = case.world.audit_flags, "checkpoints/ccu_plus-0/steps*"
    request = f"{steps}/request-2/params/*/meta/metadata"
    flags, pattern = {
        "finished": (audit_flags, ""),
        "unfinished": (audit_flags, ""),
        "in a method": (METHOD_FLAGS, f"{steps}/[0-9]*/meta/metadata"),
        "in a request": (case.world.stream_flags, request),
        "in the shadows": (audit_flags, "shadows/0/original-1-*.npz"),
    }[state]
    if pattern:
        case.copy_from(case.world.kill_at_file(flags, pattern))
        return case.world.run_undisturbed(*flags), flags
    undisturbed = case.world.run_undisturbed(*flags)
    case.copy_from(undisturbed.workdir)
    # A folder can be moved: no file contains its path.
    for path in case.workdir.glob("stages/*.json"):
        assert str(undisturbed.workdir) not in path.read_text("utf-8"), path
    if state == "unfinished":
        shutil.rmtree(case.workdir / "checkpoints" / "ccu_plus-0")
        for folder in ("stages", "outputs", "audits"):
            for path in (case.workdir / folder).glob("ccu_plus-*"):
                path.unlink()
    return undisturbed, flags
