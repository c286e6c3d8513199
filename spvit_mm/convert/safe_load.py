"""Reading a checkpoint of unknown origin without running what it holds.

A ``.pth`` file is a pickle, and a pickle is a program. The unpickler here knows
the few names that checkpoints need and refuses every other, on every version
of PyTorch alike. Only tensors and plain containers are really built: an
``argparse.Namespace``, numpy scalars and arrays and mmengine's HistoryBuffer,
which such files hold beside their weights, become inert :class:`Record`, so
that no constructor or ``__setstate__`` of theirs is ever called.
"""

import pickle
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
from torch import _utils as torch_utils

from ..utils import CheckpointError, UnsafeCheckpointError

# The first bytes of what torch.save writes: a zip archive, or (before PyTorch
# 1.6) the pickled magic number.
ZIP_MAGIC = b'PK\x03\x04'
LEGACY_MAGIC = b'l\xfc\x9cF\xf9 j\xa8P\x19.'
TAR_MAGIC = b'ustar'
HTML_STARTS = (b'<!doctype', b'<html', b'<head', b'<?xml', b'<!--', b'<body')


class Record:
    """An inert stand-in for an object of a checkpoint that is no weight.

    Attributes:
        args (tuple): The arguments that its constructor would have got.
        state (object): Its pickled state, for a Namespace the dict of its
            attributes. None if it has none.
    """

    def __init__(self, *args):
        self.args = args
        self.state = None

    def get(self, name, default=None):
        """An attribute of the pickled object."""
        return (
            self.state.get(name, default) if isinstance(self.state, dict) else default
        )

    def __repr__(self):
        return f'{type(self).__name__}(args={self.args!r}, state={self.state!r})'


class NamespaceRecord(Record):
    """argparse.Namespace."""


class HistoryBufferRecord(Record):
    """mmengine.logging.HistoryBuffer, with a method of its for each name."""


class NumpyRecord(Record):
    """A numpy scalar, array or dtype."""


class NumpyArrayType(Record):
    """The class numpy.ndarray, an argument of its own reconstruction."""


def _numpy_record(*args):
    return NumpyRecord(*args)


def _history_method(owner, name):
    """Stand-in for getattr, which HistoryBuffer uses to name its statistics."""
    if owner is not HistoryBufferRecord or not isinstance(name, str):
        raise UnsafeCheckpointError('it calls `getattr` on something else')
    return HISTORY_STATISTIC


def _latin1(text, encoding):
    """Stand-in for _codecs.encode, by which old protocols write bytes."""
    if not isinstance(text, str) or encoding not in ('latin1', 'latin-1'):
        raise UnsafeCheckpointError('it calls `_codecs.encode` in an unusual way')
    return text.encode('latin1')


HISTORY_STATISTIC = Record('statistic')


def _allowed_names():
    names = {
        ('collections', 'OrderedDict'): OrderedDict,
        ('torch._utils', '_rebuild_tensor'): torch_utils._rebuild_tensor,
        ('torch._utils', '_rebuild_tensor_v2'): torch_utils._rebuild_tensor_v2,
        ('torch._utils', '_rebuild_parameter'): torch_utils._rebuild_parameter,
        ('torch', 'Size'): torch.Size,
        ('torch', 'device'): torch.device,
        ('_codecs', 'encode'): _latin1,
        ('argparse', 'Namespace'): NamespaceRecord,
        ('mmengine.logging.history_buffer', 'HistoryBuffer'): HistoryBufferRecord,
        ('numpy', 'dtype'): _numpy_record,
        ('numpy', 'ndarray'): NumpyArrayType,
    }
    for module in ('builtins', '__builtin__'):
        names[module, 'getattr'] = _history_method
    for module in ('numpy.core.multiarray', 'numpy._core.multiarray'):
        names[module, 'scalar'] = _numpy_record
        names[module, '_reconstruct'] = _numpy_record
    for name in ('min', 'max', 'current', 'mean'):
        # HistoryBuffer's statistics, which newer protocols name so.
        owner = 'mmengine.logging.history_buffer'
        names[owner, f'HistoryBuffer.{name}'] = HISTORY_STATISTIC
    for name, value in vars(torch).items():
        if isinstance(value, torch.dtype):
            names['torch', name] = value
    return names


ALLOWED = _allowed_names()
# What a pickle may call; the rest of ALLOWED are values.
CALLABLE = [value for value in ALLOWED.values() if callable(value)]


class RestrictedUnpickler(pickle._Unpickler):
    """An unpickler that builds tensors, containers and Records alone.

    The pure Python one, since in the other the opcodes that call objects and
    set their state cannot be guarded.

    Raises:
        UnsafeCheckpointError: At the first name or opcode that is not allowed.
    """

    dispatch = dict(pickle._Unpickler.dispatch)

    def find_class(self, module, name):
        try:
            return ALLOWED[module, name]
        except KeyError:
            raise UnsafeCheckpointError(f'it asks for `{module}.{name}`') from None

    def _check_call(self, func):
        if not any(func is allowed for allowed in CALLABLE):
            raise UnsafeCheckpointError(f'it calls {func!r}')

    def load_reduce(self):
        args = self.stack.pop()
        func = self.stack[-1]
        self._check_call(func)
        self.stack[-1] = func(*args)

    def load_newobj(self):
        args = self.stack.pop()
        self._check_call(self.stack[-1])
        self.stack[-1] = self.stack[-1](*args)

    def load_build(self):
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Record):
            target.state = state
        elif type(target) is OrderedDict and isinstance(state, dict):
            # The `_metadata` of a state dict: versions of modules, not weights.
            pass
        else:
            raise UnsafeCheckpointError(f'it sets the state of a {type(target)}')

    def refuse(self):
        raise UnsafeCheckpointError('it uses a pickle opcode that no checkpoint needs')

    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.NEWOBJ[0]] = load_newobj
    dispatch[pickle.BUILD[0]] = load_build
    for _code in ('INST', 'OBJ', 'NEWOBJ_EX', 'EXT1', 'EXT2', 'EXT4'):
        dispatch[getattr(pickle, _code)[0]] = refuse


def _load(file, **kwargs):
    return RestrictedUnpickler(file, **kwargs).load()


# What torch.load takes as `pickle_module`.
restricted_pickle = types.SimpleNamespace(
    __name__='restricted_pickle', Unpickler=RestrictedUnpickler, load=_load
)


def load_checkpoint_safely(path):
    """Read what torch.save wrote, without running code of the file.

    Args:
        path (str | Path): The file, of the zip format or the one before it.

    Returns:
        object: Its content, tensors on the CPU.

    Raises:
        CheckpointError: If it is missing, a directory, empty, a web page, no
            file of torch.save, or damaged; each is named.
        UnsafeCheckpointError: If it holds anything beyond tensors, plain
            containers, argparse.Namespace, numpy values and HistoryBuffer. It
            is then not read in any other way.
    """
    path = Path(path)
    _check_kind(path)
    try:
        return torch.load(
            path,
            map_location='cpu',
            pickle_module=restricted_pickle,
            weights_only=False,  # the restricted unpickler stands in its place
        )
    except UnsafeCheckpointError as error:
        raise UnsafeCheckpointError(
            f'`{path}` is refused: {error}. A checkpoint needs tensors, plain '
            'containers, argparse.Namespace, numpy scalars and HistoryBuffer; any '
            'other object could run code while it is loaded, so nothing was. If you '
            'trust its author, load it where it was made and save its state_dict '
            "alone: torch.save({'state_dict': model.state_dict()}, ...)."
        ) from None
    except Exception as error:
        # Whatever garbage makes torch or pickle stumble is the file's fault.
        raise CheckpointError(
            f'`{path}` is damaged or was only partly downloaded '
            f'({path.stat().st_size:,} bytes): {type(error).__name__}: {error}'
        ) from error


def _check_kind(path):
    """Raise a CheckpointError that says what ``path`` is, if no checkpoint."""
    if not path.exists():
        raise CheckpointError(f'`{path}` does not exist. Give a file on this machine.')
    if path.is_dir():
        raise CheckpointError(
            f'`{path}` is a directory. Give the checkpoint file in it (of {_some(path)}).'
        )
    if not path.is_file():
        raise CheckpointError(f'`{path}` is not a regular file.')
    with open(path, 'rb') as file:
        head = file.read(512)
    if not head:
        raise CheckpointError(f'`{path}` is empty (0 bytes). Download it again.')
    if head.startswith(ZIP_MAGIC):
        _check_archive(path)
        return
    is_tar = head[257:262] == TAR_MAGIC
    if head[:1] == b'\x80' and LEGACY_MAGIC in head[:40] and not is_tar:
        return

    text = head.lstrip(b'\xef\xbb\xbf \t\r\n').lower()
    if text.startswith(HTML_STARTS):
        what = (
            'a web page (HTML), not a checkpoint: the download got an error or log-in '
            'page. Download the file itself'
        )
    elif text.startswith(b'version https://git-lfs'):
        what = 'a Git LFS pointer, not the file itself. Run `git lfs pull`'
    elif head[8:9] == b'{' and int.from_bytes(head[:8], 'little') < path.stat().st_size:
        what = (
            'a safetensors file. Write it as a checkpoint first: '
            'torch.save(safetensors.torch.load_file(file), out)'
        )
    elif is_tar:
        what = 'a tar archive. Unpack it, or save it anew with PyTorch 1.6 or later'
    elif head[:1] == b'\x80':
        raise UnsafeCheckpointError(
            f'`{path}` is refused: a bare pickle, which torch.save did not write. '
            'Loading it could run code. Save the weights with torch.save instead.'
        )
    elif head[:2] in (b'\x1f\x8b', b'BZ') or head[:6] == b'\xfd7zXZ\x00':
        what = 'a compressed file. Unpack it first'
    else:
        what = f'no file of torch.save: it starts with {head[:16]!r}'
    raise CheckpointError(f'`{path}` is {what}.')


def _check_archive(path):
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            f'`{path}` is damaged or was only partly downloaded '
            f'({path.stat().st_size:,} bytes): {error}'
        ) from error
    if any(name.endswith('/constants.pkl') for name in names):
        raise UnsafeCheckpointError(
            f'`{path}` is a TorchScript archive, a program and not a checkpoint. Save '
            'the state_dict of the model instead.'
        )
    if not any(name.endswith('/data.pkl') for name in names):
        raise CheckpointError(
            f'`{path}` is a zip archive but not one of torch.save (no data.pkl). '
            'If a checkpoint is in it, unpack it.'
        )


def _some(folder, limit=5):
    names = sorted(
        p.name for p in folder.iterdir() if p.suffix in ('.pth', '.pt', '.tar')
    )
    if not names:
        return 'which none ends in .pth, .pt or .tar'
    return ', '.join(names[:limit]) + (', ...' if len(names) > limit else '')
