"""Altered files of demonstrations: each must load, or be refused in one sentence with its name.

    python tests/data/fuzz.py hdf5 10000 0        # kind, how many, seed: 5 minutes
    python tests/data/fuzz.py npz 10000 0

Anything else ends the program after the number of the file: a traceback, more than SECONDS of
processor time, or memory beyond MEGABYTES. tests/data/test_hostile.py runs a few hundred.
"""

import collections
import contextlib
import io
import json
import shutil
import signal
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import h5py  # noqa: E402
import numpy as np  # noqa: E402
from recordings import write_hdf5, write_npz, write_play  # noqa: E402

import demos  # noqa: E402
import envs  # noqa: E402

SECONDS = 10
MEGABYTES = 1000
TASKS = {"hdf5": "lift", "npz": "cube-double"}


def sources(folder: Path, kind: str) -> list[Path]:
    """Write the files that are altered."""
    if kind == "hdf5":
        first = write_hdf5(folder / "full.hdf5", [[0] * 20, [0] * 12 + [1]])
        second = write_hdf5(folder / "old.hdf5", [[0] * 9], next_obs=False)
        packed = folder / "packed.hdf5"
        with h5py.File(first) as file, h5py.File(packed, "w") as out:
            out.copy(file["data"], "data")
            for name in ("actions", "rewards"):
                values = out[f"data/demo_0/{name}"][()]
                del out[f"data/demo_0/{name}"]
                out.create_dataset(f"data/demo_0/{name}", data=values, compression="gzip")
            out.create_dataset("mask/train", data=np.array(["demo_0"], dtype="S"))
        return [first, second, packed]
    play = write_play(folder / "play.npz")
    stream = io.BytesIO()
    np.savez_compressed(stream, **dict(np.load(play)))
    packed = folder / "packed.npz"
    packed.write_bytes(stream.getvalue())
    obs = np.arange(20.0)[:, None] * np.ones(envs.TASKS["cube-double"].obs_dim)
    columns = {"observations": obs, "next_observations": obs + 1, "actions": np.zeros((20, 5))}
    columns |= {"rewards": np.zeros(20), "terminals": np.arange(20) == 9}
    return [play, packed, write_npz(folder / "d4rl.npz", columns)]


# ---- alterations of any file


def altered_bytes(content: bytes, rng: np.random.Generator) -> bytes:
    """Flip bits, overwrite, zero, cut, repeat or insert."""
    data = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        if not data:
            break
        place = int(rng.integers(len(data)))
        length = int(rng.integers(1, 65))
        way = rng.integers(7)
        if way == 0:
            data[place] ^= 1 << int(rng.integers(8))
        elif way == 1:
            data[place : place + length] = rng.bytes(length)
        elif way == 2:
            data[place : place + length] = bytes(length)
        elif way == 3:
            data[place : place + length] = b"\xff" * length
        elif way == 4 and rng.random() < 0.3:
            del data[place:]
        elif way == 5:
            del data[place : place + length]
        else:
            data[place:place] = data[:length]
    return bytes(data)


# ---- alterations that keep the container whole

TEXTS = ("", "{", "[]", "7", "null", '"x"', "[" * 5000, '{"env_name": "Lift"}', "\x00", "{}")
SHAPES = ((), (0,), (3,), (20, 7), (7, 20), (2, 3, 4), (20, 0), (10**8, 7), (2**40,), (20,))


def random_value(rng: np.random.Generator):
    """Return an array or text of some other kind than expected."""
    shape = SHAPES[rng.integers(len(SHAPES))]
    if np.prod(shape, dtype=object) > 10_000:
        shape = (3,)
    way = rng.integers(6)
    if way == 0:
        return TEXTS[rng.integers(len(TEXTS))].replace("\x00", "")
    if way == 1:
        return np.full(shape, np.nan)
    if way == 2:
        return np.full(shape, 1e300)
    if way == 3:
        return np.zeros(shape, complex)
    if way == 4:
        return np.zeros(shape, "S3")
    return rng.integers(-(2**62), 2**62, shape)


def altered_hdf5(source: Path, path: Path, rng: np.random.Generator) -> None:
    """Replace objects, links, attributes and claims of an HDF5 file."""
    shutil.copy(source, path)
    with h5py.File(path, "r+") as file:
        objects = ["data"]
        file.visit(objects.append)
        for _ in range(rng.integers(1, 4)):
            name = objects[rng.integers(len(objects))]
            with contextlib.suppress(KeyError, ValueError, TypeError, OSError, RuntimeError):
                alter_object(file, name, rng)


def alter_object(file: h5py.File, name: str, rng: np.random.Generator) -> None:
    way = rng.integers(7)
    if way == 0:
        del file[name]
    elif way == 1:
        del file[name]
        file[name] = random_value(rng)
    elif way == 2:
        del file[name]
        places = ("/nowhere", f"/{name}", "/", "/data", "/data/demo_0")
        file[name] = h5py.SoftLink(places[rng.integers(len(places))])
    elif way == 3:
        del file[name]
        file[name] = h5py.ExternalLink("full.hdf5", "/data")
    elif way == 4:
        del file[name]
        shape = SHAPES[rng.integers(len(SHAPES))]
        file.create_dataset(name, shape, "f8", chunks=True if shape else None)
    elif way == 5:
        del file[name]
        file.create_group(name)
    else:
        attributes = file["data"].attrs
        keys = ("env_args", "task", "total", "failed")
        attributes[keys[rng.integers(len(keys))]] = random_value(rng)
        file[name].attrs["failed"] = random_value(rng)
        file["data"].attrs["env_args"] = json.dumps(
            {"env_name": "Lift", "env_kwargs": random_value(rng)}, default=str
        )


HEADERS = (b"", b"(((((", b"{'descr': '<f4'}", b"\x93NUMPY", b"{" * 9000, b"\x93NUMPY\x01\x00\xff")


def altered_npz(source: Path, path: Path, rng: np.random.Generator) -> None:
    """Replace members of a zip whose checksums are right again."""
    with zipfile.ZipFile(source) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    names = sorted(members)
    for _ in range(rng.integers(1, 3)):
        name = names[rng.integers(len(names))]
        members[name] = altered_member(members[name], rng)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            if rng.random() > 0.05:
                archive.writestr(name, content)


def altered_member(content: bytes, rng: np.random.Generator) -> bytes:
    way = rng.integers(4)
    if way == 0:
        return altered_bytes(content, rng)
    if way == 1:
        start = altered_bytes(content[:128], rng)
        return start + content[128:]
    if way == 2:
        return HEADERS[rng.integers(len(HEADERS))] + content[128:]
    stream = io.BytesIO()
    value = np.asarray(random_value(rng))
    shape = SHAPES[rng.integers(len(SHAPES))] if rng.random() < 0.5 else value.shape
    header = {"descr": value.dtype.str, "fortran_order": bool(rng.integers(2)), "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue() + value.tobytes()


# ---- running


def alter(files: list[Path], kind: str, path: Path, rng: np.random.Generator) -> None:
    source = files[rng.integers(len(files))]
    if rng.random() < 0.6:
        path.write_bytes(altered_bytes(source.read_bytes(), rng))
    elif kind == "hdf5":
        altered_hdf5(source, path, rng)
    else:
        altered_npz(source, path, rng)


def outcome(path: Path, kind: str) -> str:
    """Load a file as training does: "loaded" or "refused". Anything else is raised."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            data = demos.load(path, TASKS[kind])
            if kind == "hdf5":
                demos.env_args(path)
    except ValueError as error:
        text = str(error)
        if str(path) not in text or "\n" in text or len(text) > 2000:
            raise AssertionError(f"not one sentence with the file's name: {text}") from error
        return "refused"
    for name, values in data.items():
        assert np.isfinite(values).all(), name
        assert len(values) == len(data["obs"]) > 0, name
    assert np.abs(data["action"]).max() <= 1
    return "loaded"


def peak_memory() -> float:
    """Return the most memory, in MB, that this program has had.

    Not by getrusage, whose figure a program inherits from the one that started it.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def run(kind: str, count: int, seed: int) -> collections.Counter:
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, also inside the library
    found = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        files = sources(Path(folder), kind)
        path = Path(folder) / f"altered.{kind}"
        for number in range(count):
            alter(files, kind, path, np.random.default_rng([seed, number]))
            print(f"file {number} of seed {seed}", file=sys.stderr, flush=True)
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            found[outcome(path, kind)] += 1
            signal.setitimer(signal.ITIMER_PROF, 0)
    used = peak_memory()
    if used > MEGABYTES:
        sys.exit(f"{used:.0f} MB were used")
    return found


if __name__ == "__main__":
    which, how_many, first_seed = sys.argv[1:]
    counts = run(which, int(how_many), int(first_seed))
    print(f"{counts['loaded']} loaded, {counts['refused']} refused")
