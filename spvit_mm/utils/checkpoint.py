"""Opening checkpoints without running what they hold.

A ``.pth`` file is a pickle, and a pickle is a program. torch's weights-only
unpickler runs none of it: it makes tensors, plain containers and what it is
allowed by name. Beside their weights, files of timm and mmengine hold a few
harmless objects more. Those are allowed as inert stand-ins, which take down what
the object would have been made of and do nothing. The object itself is made
afterwards, out of the parts that it is known to have.
"""

import argparse
import pickle
import re
import tarfile
import threading
import zipfile
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch

from .errors import CheckpointError, UnsafeCheckpointError

ZIP_MAGIC = b'PK\x03\x04'
# How files of PyTorch before 1.6 start: a pickled number.
LEGACY_MAGIC = b'l\xfc\x9cF\xf9 j\xa8P\x19.'
HTML_STARTS = (b'<!doctype', b'<html', b'<head', b'<?xml', b'<!--', b'<body')
# Whether torch's unpickler can be allowed anything: since PyTorch 2.4.
CAN_ALLOW = hasattr(torch.serialization, 'add_safe_globals')


class StandIn:
    """An object of a file that was not made: the parts that it is made of."""

    def __new__(cls, *args):
        stand_in = super().__new__(cls)
        stand_in.args = args
        stand_in.state = None
        return stand_in

    def __setstate__(self, state):
        self.state = state


def _stand_in(name):
    # torch knows what is allowed by the name that it says of itself.
    module, _, short = name.rpartition('.')
    return type(short, (StandIn,), dict(__module__=module, __qualname__=short))


def _make_namespace(saved):
    namespace = argparse.Namespace()
    vars(namespace).update(_make(saved.state or {}))
    return namespace


def _make_history(saved):
    # Its state names its statistics (`getattr`), too; a new one has its own.
    from mmengine.logging import HistoryBuffer

    log, count = (_make(saved.state[key]) for key in ('_log_history', '_count_history'))
    return HistoryBuffer(log, count, saved.state['max_length'])


def _make_dtype(saved):
    """Of numbers alone: numpy trusts the state of others, down to their pointers."""
    text = saved.args[0]
    if not isinstance(text, str) or not re.fullmatch(r'[biufc]\d+', text):
        raise UnsafeCheckpointError(f'it holds numpy data of the type {text!r}')
    return np.dtype(text).newbyteorder(saved.state[1])


def _make_bytes(saved):
    return saved.args[0].encode('latin1')


def _make_scalar(saved):
    dtype, data = _make(saved.args)
    return np.frombuffer(data, dtype)[0]


def _make_array(saved):
    shape, dtype, is_fortran, data = _make(saved.state[-4:])
    array = np.frombuffer(data, dtype).copy()
    return array.reshape(shape, order='F' if is_fortran else 'C')


MAKERS = {
    _stand_in('argparse.Namespace'): _make_namespace,
    _stand_in('mmengine.logging.history_buffer.HistoryBuffer'): _make_history,
    # How pickle writes bytes; newer torch takes it by itself.
    _stand_in('_codecs.encode'): _make_bytes,
    _stand_in('numpy.dtype'): _make_dtype,
    # numpy 1 and 2
    _stand_in('numpy.core.multiarray.scalar'): _make_scalar,
    _stand_in('numpy._core.multiarray.scalar'): _make_scalar,
    _stand_in('numpy.core.multiarray._reconstruct'): _make_array,
    _stand_in('numpy._core.multiarray._reconstruct'): _make_array,
}
# Named among the parts of the others only.
PARTS = (_stand_in('builtins.getattr'), _stand_in('numpy.ndarray'))
ALLOWED = {f'{cls.__module__}.{cls.__qualname__}': cls for cls in (*MAKERS, *PARTS)}


def _make(value):
    """The content of a file with the objects in the place of their stand-ins."""
    if isinstance(value, dict):
        items = [(_make(key), _make(item)) for key, item in value.items()]
        value.clear()
        for key, item in items:
            value[key] = item
    elif isinstance(value, list):
        value[:] = [_make(item) for item in value]
    elif type(value) in (tuple, set):
        return type(value)(_make(item) for item in value)
    elif type(value) in MAKERS:
        return MAKERS[type(value)](value)
    else:
        for name, cls in ALLOWED.items():
            if value is cls or type(value) is cls:
                raise UnsafeCheckpointError(f'it asks for `{name}`')
    return value


_LOCK = threading.Lock()


@contextmanager
def _allow_stand_ins():
    """Let torch's unpickler make the stand-ins, and nothing that others allowed.

    What is allowed is a global of torch's, so one thread at a time may set it.
    """
    with _LOCK:
        others = torch.serialization.get_safe_globals()
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(list(ALLOWED.values()))
        try:
            yield
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(others)


def read_checkpoint(path, trust=False, plain=False):
    """Read what torch.save wrote, to the CPU, without running code of the file.

    Beside tensors and plain containers a file may hold what timm and mmengine store:
    argparse.Namespace, numpy's numbers and arrays of numbers, and HistoryBuffer. That
    takes PyTorch 2.4; an older one refuses a file that holds any of them. The guard is
    torch's own (``weights_only``) and as good as the torch that is installed: versions
    before 2.10 have known holes.

    Args:
        path (str | Path): The file, of the zip format or the one before it.
        trust (bool): Open it with pickle, which runs whatever the file says.
            Defaults to False.
        plain (bool): Take tensors and plain containers alone, as a label map is;
            threads may then read at the same time. Defaults to False.

    Returns:
        object: Its content.

    Raises:
        CheckpointError: If it is missing, a directory, empty, a web page, no file of
            torch.save, or damaged; each is named.
        UnsafeCheckpointError: If it asks for any other object, which is named. The
            file is then not opened in any other way.
    """
    path = Path(path).expanduser()
    check_checkpoint_file(path)
    try:
        if trust:
            return torch.load(path, map_location='cpu', weights_only=False)
        with _allow_stand_ins() if CAN_ALLOW and not plain else nullcontext():
            content = torch.load(path, map_location='cpu', weights_only=True)
        return _make(content)
    except (pickle.UnpicklingError, UnsafeCheckpointError) as error:
        raise _refusal(path, error, plain) from None
    except Exception as error:
        # Whatever garbage makes torch or pickle stumble is the file's fault.
        raise _damage(path, error) from error


@contextmanager
def safe_loader(trust=False):
    """Let mmengine open local checkpoints by :func:`read_checkpoint`, inside ``with``.

    These are all files that go through mmengine's CheckpointLoader: ``load_from``,
    ``resume``, ``init_cfg=dict(type='Pretrained')``, ``load_checkpoint`` and what
    mmpretrain and mmsegmentation build on it. Tensors come on the CPU, whatever
    ``map_location`` says. What has an address (``http://``, ``s3://``,
    ``torchvision://``, ...) mmengine still downloads and opens by itself.

    Args:
        trust (bool): See :func:`read_checkpoint`. Defaults to False.
    """
    from mmengine.runner import CheckpointLoader

    # mmengine logs the end of its name: "Loads checkpoint by local backend".
    def load_from_local(filename, map_location=None):
        return read_checkpoint(filename, trust)

    before = CheckpointLoader._get_checkpoint_loader('')
    CheckpointLoader.register_scheme('', load_from_local, force=True)
    try:
        yield
    finally:
        CheckpointLoader.register_scheme('', before, force=True)


def _refusal(path, error, plain):
    """The error that names what a file asked for."""
    reason = str(error)
    if isinstance(error, pickle.UnpicklingError):
        asked = re.search(r'(?:GLOBAL|Unsupported class) ([\w.]+)', reason)
        odd = re.search(r'(?:Unsupported|Can only|Trying to|Only) [^\n]*', reason)
        if odd is None:
            return _damage(path, error)
        if asked is None:
            reason = f'its pickle is none of torch.save ({odd[0]})'
        elif asked[1] in ALLOWED and not CAN_ALLOW:
            reason = f'for `{asked[1]}` it takes PyTorch 2.4 or newer'
        else:
            reason = f'it asks for `{asked[1]}`'
    message = (
        f'`{path}` is refused: {reason}. That could run code while it is loaded, so '
        'nothing was.'
    )
    if not plain:
        message += (
            ' If you trust its author, say so with `--trust-checkpoint` (in Python: '
            'trust=True), or save the weights alone where it was made: '
            "torch.save({'state_dict': model.state_dict()}, ...)."
        )
    return UnsafeCheckpointError(message)


def _damage(path, error):
    return CheckpointError(
        f'`{path}` is damaged or was only partly downloaded '
        f'({path.stat().st_size:,} bytes): {type(error).__name__}: {error}'
    )


def check_checkpoint_file(path):
    """Raise a CheckpointError that says what ``path`` is, if no checkpoint.

    Args:
        path (str | Path): The file; its first bytes and its table of contents are read.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        what = 'is a directory, not a file' if path.is_dir() else 'does not exist'
        raise CheckpointError(f'`{path}` {what}.')
    try:
        with open(path, 'rb') as file:
            head = file.read(64)
    except OSError as error:
        raise CheckpointError(f'`{path}` cannot be read: {error}') from error
    what = _kind_of_archive(path) if head[:4] == ZIP_MAGIC else _kind_of(path, head)
    if what is not None:
        raise CheckpointError(f'`{path}` is {what}.')


def _kind_of_archive(path):
    """What a zip archive is, if no checkpoint."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.rpartition('/')[-1] for name in archive.namelist()}
    except zipfile.BadZipFile as error:
        raise _damage(path, error) from error
    if 'constants.pkl' in names:
        # Older torch runs it, whatever it was told.
        return 'TorchScript, a program. Save the state_dict of the model instead'
    if 'data.pkl' not in names:
        return 'a zip archive, but not one of torch.save (no data.pkl). Unpack it'
    return None


def _kind_of(path, head):
    """What a file is, by its first bytes, if no checkpoint."""
    # The oldest files of torch are tar archives, which it reads beside all guards.
    if tarfile.is_tarfile(path):
        return 'a tar archive. Unpack it, or save it anew with PyTorch 1.6 or later'
    if head[:1] == b'\x80':
        bare = 'a bare pickle, which could run code. Save the weights with torch.save'
        return None if LEGACY_MAGIC in head else bare
    text = head.lstrip(b'\xef\xbb\xbf \t\r\n').lower()
    if text.startswith(HTML_STARTS):
        return 'a web page (HTML), as of an error or a log-in. Download the file itself'
    if text.startswith(b'version https://git-lfs'):
        return 'a Git LFS pointer, not the file itself. Run `git lfs pull`'
    if head[8:9] == b'{' and int.from_bytes(head[:8], 'little') < path.stat().st_size:
        return 'a safetensors file. Save what safetensors.torch.load_file gives of it'
    if not head:
        return 'empty (0 bytes). Download it again'
    return f'no file of torch.save: it starts with {head[:16]!r}'
