"""Opening checkpoints without running what they hold.

A ``.pth`` file is a pickle, and a pickle is a program. torch's weights-only
unpickler runs none of it: it makes tensors, plain containers and what it is
allowed by name. Beside their weights, files of timm and mmengine hold a few
harmless objects more. Those are allowed as inert stand-ins, which take down what
the object would have been made of and do nothing. The object itself is made
afterwards, out of the parts that it is known to have.
"""

import argparse
import hashlib
import pickle
import re
import tarfile
import threading
import zipfile
from contextlib import contextmanager, nullcontext
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import torch

from .errors import CheckpointError, UnsafeCheckpointError
from .files import whole_file

try:  # a small library, but an environment of before may lack it
    import safetensors
    import safetensors.torch
except ImportError:
    safetensors = None

ZIP_MAGIC = b'PK\x03\x04'
# How files of PyTorch before 1.6 start: a pickled number.
LEGACY_MAGIC = b'l\xfc\x9cF\xf9 j\xa8P\x19.'
# `deit_small_patch16_224-cd65a155.pth`: the hash of what is in it, as torch.hub has it.
HASHED_NAME = re.compile(r'-(?=\d*[a-f])[0-9a-f]{8,}(\.|$)')  # not a date
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

    A safetensors file is read as well, by its library: it is a dict of tensors.

    Beside tensors and plain containers a file may hold what timm and mmengine store:
    argparse.Namespace, numpy's numbers and arrays of numbers, and HistoryBuffer. That
    takes PyTorch 2.4; an older one refuses a file that holds any of them. The guard is
    torch's own (``weights_only``) and as good as the torch that is installed: versions
    before 2.10 have known holes.

    Args:
        path (str | Path): The file: of the zip format, the one before it, or
            safetensors.
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
    if _is_safetensors(path):
        return _read_safetensors(path)
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


def _read_safetensors(path):
    """The tensors of a safetensors file, which can hold nothing that runs."""
    _need_safetensors(path)
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, ValueError) as error:
        raise _damage(path, error) from error


def _need_safetensors(path):
    if safetensors is None:
        raise CheckpointError(
            f'`{path}` is a safetensors file, for which the library is missing: '
            'pip install safetensors'
        )


def check_weights(content, path):
    """Raise a CheckpointError, which says what is there, unless it holds weights.

    Args:
        content (object): What :func:`read_checkpoint` returned.
        path (str | Path): Where it is from, for the message.
    """
    state, what, hint = content, 'it', ''
    if isinstance(content, dict) and 'state_dict' in content:
        state, what = content['state_dict'], 'its `state_dict`'
    if not isinstance(state, dict):
        wrong = f'is a {type(state).__name__}'
    elif not state:
        wrong = 'is empty'
    else:
        odd = [name for name, value in state.items() if not _is_weight(name, value)]
        if not odd:
            return
        wrong = f'holds, as {odd[0]!r}, a {type(state[odd[0]]).__name__}'
        if any(isinstance(state[name], dict) for name in odd):
            hint = (
                ' Files of other codebases, which have their weights elsewhere, are '
                'converted by tools/model_converters/convert.py.'
            )
    raise CheckpointError(
        f'`{path}` holds no weights that a model of OpenMMLab can load: looked for was '
        f'a dict of tensors by name, alone or under `state_dict`, but {what} {wrong}.'
        + hint
    )


def _is_weight(name, value):
    # What a module of one's own saves beside its tensors can be anything.
    return isinstance(name, str) and (
        isinstance(value, torch.Tensor) or name.endswith('_extra_state')
    )


def write_checkpoint(content, path):
    """Write a checkpoint, whole or not at all.

    Args:
        content (dict): ``state_dict``, which alone goes into a safetensors file, and
            ``meta``, whose entries are strings there.
        path (str | Path): The file: safetensors where it ends in ``.safetensors``, else
            of torch.save.

    Raises:
        CheckpointError: If the safetensors library is missing.
    """
    safe = str(path).endswith('.safetensors')
    if safe:
        _need_safetensors(path)
    with whole_file(str(path)) as partial:
        if safe:
            # Two names of one tensor are two tensors there.
            state = {
                name: value.detach().cpu().contiguous().clone()
                for name, value in content['state_dict'].items()
            }
            meta = {key: str(value) for key, value in content.get('meta', {}).items()}
            # 'pt' is what other readers look for.
            safetensors.torch.save_file(state, partial, {**meta, 'format': 'pt'})
        else:
            torch.save(content, partial)


@contextmanager
def safe_loader(trust=False):
    """Let mmengine open checkpoints by :func:`read_checkpoint`, inside ``with``.

    These are all that go through mmengine's CheckpointLoader: ``load_from``,
    ``resume``, ``init_cfg=dict(type='Pretrained')``, ``load_checkpoint`` and what
    mmpretrain and mmsegmentation build on it, such as ``get_model`` and the
    inferencers; files, also of safetensors, and what is downloaded from ``http://`` and
    ``https://``. Tensors come on the CPU, whatever ``map_location`` says. The names of
    hubs and storages (``torchvision://``, ``openmmlab://``, ``s3://``, ...) mmengine
    still looks up and opens by itself.

    Args:
        trust (bool, optional): See :func:`read_checkpoint`. None: as a ``safe_loader``
            around this one says, without one False. Defaults to False.
    """
    from mmengine.runner import CheckpointLoader

    before = {
        scheme: CheckpointLoader._get_checkpoint_loader(scheme)
        for scheme in ('', 'http://', 'https://')
    }
    if trust is None:
        trust = getattr(before[''], 'trust', False)

    # mmengine logs the ends of their names: "Loads checkpoint by local backend".
    def load_from_local(filename, map_location=None):
        content = read_checkpoint(filename, trust)
        check_weights(content, filename)
        meta = content.get('meta')
        if not trust and isinstance(meta, dict):
            # A config of before mmengine, which would run it when it resumes.
            meta.pop('config', None)
        # mmengine's EMAHook knows no bare one, as of safetensors.
        return content if 'state_dict' in content else dict(state_dict=content)

    def load_from_http(filename, map_location=None):
        return load_from_local(_download(filename))

    load_from_local.trust = trust
    ours = {scheme: load_from_http if scheme else load_from_local for scheme in before}
    try:
        for scheme, loader in ours.items():
            CheckpointLoader.register_scheme(scheme, loader, force=True)
        yield
    finally:
        for scheme, loader in before.items():
            CheckpointLoader.register_scheme(scheme, loader, force=True)


def _download(url):
    """Fetch a file to where torch keeps what it downloads, once; returns its path.

    A name without a hash of the content (as torch.hub's have one) gets one of the
    address: many addresses end in ``model.safetensors``.
    """
    from mmengine.dist import barrier, is_main_process

    parts = urlparse(url)
    name = Path(parts.path).name
    if not HASHED_NAME.search(name):
        stem, dot, suffix = name.rpartition('.')
        # Without the query, which may be a signature of the hour.
        address = f'{parts.netloc}{parts.path}'
        digest = hashlib.sha256(address.encode()).hexdigest()[:8]
        name = f'{stem}-{digest}{dot}{suffix}' if dot else f'{name}-{digest}'
    path = Path(torch.hub.get_dir(), 'checkpoints', name)
    if is_main_process():
        _fetch(url, path)
    barrier()
    _fetch(url, path)  # on a machine that does not see the disk of the first
    return path


def _fetch(url, path):
    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(path))
    except OSError as error:
        raise CheckpointError(
            f'`{url}` cannot be downloaded: {error}. By hand, put it at {path}.'
        ) from error


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


def _is_safetensors(path):
    """Whether a file starts as they do: the length of a dict in JSON, and that."""
    with open(path, 'rb') as file:
        head = file.read(9)
    length = int.from_bytes(head[:8], 'little')
    return head[8:] == b'{' and length < path.stat().st_size


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
    if _is_safetensors(path):
        return None
    if head[:1] == b'\x80':
        bare = 'a bare pickle, which could run code. Save the weights with torch.save'
        return None if LEGACY_MAGIC in head else bare
    text = head.lstrip(b'\xef\xbb\xbf \t\r\n').lower()
    if text.startswith(HTML_STARTS):
        return 'a web page (HTML), as of an error or a log-in. Download the file itself'
    if text.startswith(b'version https://git-lfs'):
        return 'a Git LFS pointer, not the file itself. Run `git lfs pull`'
    if not head:
        return 'empty (0 bytes). Download it again'
    return f'no file of torch.save: it starts with {head[:16]!r}'
