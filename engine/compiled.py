"""Compile a phase's loss, whole or block by block, with a cache on disk for the next run."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from letheon import durable
from letheon.engine.memory.activations import require_blocks
from letheon.engine.method import Loss, PartsLoss, Phase
from letheon.errors import InputError, RunFailed
from letheon.kernels import keyed
from letheon.loaders.batch import Batch
from letheon.progress import note

if TYPE_CHECKING:
    from torch.compiler._cache import CacheInfo

BACKEND = "inductor"
_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"

_PLAIN = (bool, int, float, str, tuple, type(None))  # settings that a graph takes as constants

Start = Literal["", "cold", "warm"]


def compile_loss(
    loss: Loss | PartsLoss, mode: Literal["off", "blocks", "default", "max"], model: nn.Module
) -> Loss | PartsLoss:
    """The loss and its backward pass as one graph for each shape of batch it meets.

    `blocks` compiles the blocks of `model` alone, and `off` nothing. `max` also searches kernels
    and, on CUDA, replays the graph with CUDA graphs. Shapes are static: an epoch has at most three
    sizes of batch, so nothing is compiled after the first epoch.

    Raises:
        InputError: as `compile_blocks`.
        torch._dynamo.exc.Unsupported: at the first call, where the loss is not one whole graph.
    """
    if mode == "off":
        return loss
    keep_cache()
    if mode == "blocks":
        return compile_blocks(loss, model)
    torch.compiler.assume_constant_result(keyed.stream_number)

    def whole(net: nn.Module, batch: Batch) -> Tensor | Mapping[str, Tensor]:
        return loss(net, batch)

    if mode == "max" and BACKEND == "inductor":
        return _mark_steps(_compile(whole, "max-autotune"))
    return _compile(whole)


def held_numbers(loss: Loss | PartsLoss) -> tuple[Any, ...]:
    """List the numbers and texts that a loss has taken from where it was made, such as the epoch.

    Of a function within `phases`, its defaults, the functions that it calls from there, the
    containers that it holds, and a `partial`; a method's own settings never change.
    """
    return tuple(_numbers(loss, set()))


def _numbers(value: Any, seen: set[int]) -> Iterator[bool | int | float | str]:
    """Yield what a value is or holds; `seen` are the ids of the containers that hold it."""
    if isinstance(value, bool | int | float | str):
        yield value
        return
    if id(value) in seen:  # such as a function that calls itself
        return
    seen.add(id(value))
    for part in _parts(value):
        yield from _numbers(part, seen)


def _parts(value: Any) -> Sequence[Any]:
    """List what a function, a partial or a container holds; nothing of all others."""
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, MethodType):
        return [value.__func__]
    if isinstance(value, FunctionType):
        bound = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        for cell in value.__closure__ or ():
            with suppress(ValueError):  # a name that is not assigned yet
                bound.append(cell.cell_contents)
        return bound
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    return [*value] if isinstance(value, list | tuple) else []


def check_numbers(phase: Phase, known: dict[str, tuple[Any, ...]]) -> None:
    """Refuse a loss that holds other numbers than when its name was compiled; `known` keeps these.

    Raises:
        RunFailed: it holds the number of the epoch, or one that follows from it.
    """
    numbers = held_numbers(phase.loss)
    if numbers != known.setdefault(phase.name, numbers):
        raise RunFailed(
            f"got a loss of phase {phase.name} that holds {numbers} and was compiled with "
            f"{known[phase.name]}; expected one loss of each name; read run.epoch, a tensor, in "
            "it, name its phases apart, or do not compile"
        )


def compile_blocks(loss: Loss | PartsLoss, model: nn.Module) -> Loss | PartsLoss:
    """The loss with the network's repeated blocks compiled, each kind of block as one graph.

    The rest, and all that is not called within this loss, stays as it is. Blocks whose layers,
    settings and weights are alike in all but their values share a graph, so that a deep network
    costs no more compiling than a shallow one.

    Raises:
        InputError: as `require_blocks`.
        torch._dynamo.exc.Unsupported: at the first call, where a block is not one whole graph.
    """
    blocks = require_blocks(model, "compile")
    graphs: dict[Hashable, Callable[..., Any]] = {}
    forwards: list[Callable[..., Any]] = []  # by block; filled once the phase has set its modes

    def within(net: nn.Module, batch: Batch) -> Any:
        for block in blocks[len(forwards) :]:
            kind = _kind(block)
            if kind not in graphs:
                graphs[kind] = _compile(_forward)
            forwards.append(partial(graphs[kind], block))
        for block, forward in zip(blocks, forwards, strict=True):
            vars(block)["forward"] = forward
        try:
            return loss(net, batch)
        finally:
            for block in blocks:
                del vars(block)["forward"]

    return within


def _forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(block).forward(block, *args, **kwargs)


def _kind(block: nn.Module) -> Hashable:
    """What tells one graph's blocks from another's: layers, plain settings, layouts of weights."""
    return tuple(
        (
            name,
            type(layer),
            id(vars(layer).get("forward")),  # a layer with a pass of its own has its own graph
            repr([(key, value) for key, value in vars(layer).items() if isinstance(value, _PLAIN)]),
            *(
                (key, tensor.shape, tensor.stride(), tensor.dtype, tensor.requires_grad)
                for tensors in (layer._parameters, layer._buffers)
                for key, tensor in tensors.items()
                if tensor is not None
            ),
        )
        for name, layer in block.named_modules()
    )


def _compile(function: Callable[..., Any], mode: str | None = None) -> Callable[..., Any]:
    """Compile a function as one graph for each shape it meets.

    torch counts recompilations by code object; a copy keeps other phases and runs out of it.
    """
    own = FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        None,
        function.__closure__,
    )
    graph: Callable[..., Any] = torch.compile(
        own, fullgraph=True, dynamic=False, mode=mode, backend=BACKEND
    )
    return graph


def _mark_steps(graph: Loss | PartsLoss) -> Loss | PartsLoss:
    """Mark where a step begins, so that CUDA graphs may reuse the outputs of the last one."""

    def step(net: nn.Module, batch: Batch) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return graph(net, batch)

    return step


def keep_cache() -> Path:
    """The folder of compiled code: as TORCHINDUCTOR_CACHE_DIR says, else the user's cache folder.

    torch's own default lies in the temporary folder and is lost when the machine restarts.
    """
    temporary = str(Path(tempfile.gettempdir()) / "torchinductor_")  # torch may have set it already
    if os.environ.get(_VARIABLE, temporary).startswith(temporary):
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        os.environ[_VARIABLE] = str(home / "letheon" / "inductor")
    return Path(os.environ[_VARIABLE])


class CodeFile:
    """Compiled code in one file, for a warm start where the cache on disk is not.

    torch makes and reads it; it holds pickles and machine code that are run as they are, so that
    it is read by name alone and only where no other user can have written it. Code of another
    version of torch, and a file that was damaged, is not run, and written anew.
    """

    def __init__(self, path: Path | None, main: bool) -> None:
        """Read the file, where there is one; the first rank (`main`) is to write it.

        Raises:
            InputError: as `read_code`.
        """
        self._path = path if main else None
        self._held: set[tuple[str, str]] = set()
        code = read_code(path) if path is not None else None
        if code is not None:
            keep_cache()
            self._held = _list_keys(torch.compiler.load_cache_artifacts(code))

    def save(self) -> None:
        """Write all that this process has compiled or read, where the file lacks any of it.

        A file that cannot be written is a note: the run goes on, and the next call tries again.
        """
        found = torch.compiler.save_cache_artifacts() if self._path is not None else None
        if self._path is None or found is None:  # nothing was compiled
            return
        keys = _list_keys(found[1])
        if keys <= self._held:
            return
        try:
            with durable.replacing(self._path, len(found[0])) as temporary:
                temporary.touch(0o600)
                temporary.write_bytes(_head(found[0]) + found[0])
        except RunFailed as error:
            note(f"compiled code is not saved, and the run goes on: {error}")
            return
        self._held = keys


def check_code_file(path: Path, main: bool) -> None:
    """Refuse a file of compiled code that cannot be read or, by the first rank, be written.

    Raises:
        InputError: as `read_code`, or a folder that is missing or that nothing can be written to.
    """
    try:
        read_code(path)
    except OSError as error:
        raise _refuse(path, f"which cannot be read ({error.strerror})") from error
    if path.exists() and not path.is_file():
        raise _refuse(path, "which is no file")
    if main and not path.parent.is_dir():
        raise _refuse(path, "whose folder does not exist")
    if main and not os.access(path.parent, os.W_OK | os.X_OK):
        raise _refuse(path, "whose folder cannot be written to")


def _refuse(path: Path, why: str) -> InputError:
    return InputError(
        f"got {path}, {why}; expected a file of yours, or a new one in a folder that is there and "
        "can be written to; make that folder or name another file",
        option="compile_file",
    )


def _list_keys(info: CacheInfo | None) -> set[tuple[str, str]]:
    """Kind and key of each piece of code; none where torch could not use what it was to read."""
    found = info.artifacts if info is not None else {}
    return {(kind, key) for kind, keys in found.items() for key in keys}


def read_code(path: Path) -> bytes | None:
    """Read what `CodeFile.save` wrote; None where there is nothing to use.

    Raises:
        InputError: a file that another user could have written, whose code would be run.
    """
    if not path.is_file():
        return None
    with path.open("rb") as file:
        facts = os.fstat(file.fileno())
        if facts.st_uid not in (0, os.getuid()) or facts.st_mode & 0o022:
            raise InputError(
                f"got {path}, which another user can have written, and whose code would be run; "
                "expected a file of yours that nobody else may write to; remove it, or see who "
                "wrote it and take the others' right to write away",
                option="compile_file",
            )
        content = file.read()
    code = content[content.find(b"\n") + 1 :]
    return code if content == _head(code) + code else None


def _head(code: bytes) -> bytes:
    """One line: which torch can read the code, and its digest, which finds damage."""
    return f"torch {torch.__version__} sha256 {hashlib.sha256(code).hexdigest()}\n".encode()


def cache_watch() -> Callable[[], Start]:
    """Start watching torch's cache of graphs; call it before the first graph.

    Returns:
        A function that says "warm" if every graph since came from the cache, "cold" if one was
        compiled, "" if there was none.
    """
    before = _lookups()

    def start() -> Start:
        found, missed = (now - then for now, then in zip(_lookups(), before, strict=True))
        if missed:
            return "cold"
        return "warm" if found else ""

    return start


def _lookups() -> tuple[int, int]:
    """Hits and misses of torch's caches of whole graphs so far in this process."""
    if "torch._dynamo.utils" not in sys.modules:  # a second to import; nothing was compiled
        return 0, 0
    from torch._dynamo.utils import counters

    joint, single = counters["aot_autograd"], counters["inductor"]
    found = joint["autograd_cache_hit"] + single["fxgraph_cache_hit"]
    return found, single["fxgraph_cache_miss"] + single["fxgraph_cache_bypass"]
