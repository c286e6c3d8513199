import pytest

from spvit_mm.apis import building, run_cli
from spvit_mm.utils import LabelMapError, UserError


def test_one_line_of_what_a_worker_raised(capsys):
    """torch puts the worker's traceback into the message."""

    def main(argv):
        raise LabelMapError(
            'Caught LabelMapError in DataLoader worker process 0.\n'
            'Original Traceback (most recent call last):\n  File "x.py", line 1\n'
            'spvit_mm.utils.errors.LabelMapError: The label map of a/0.png is missing.'
        )

    with pytest.raises(SystemExit) as error:
        run_cli(main, 'train.py', [])
    assert error.value.code == 2
    expected = 'train.py: error: The label map of a/0.png is missing.\n'
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize('rank', [0, 1])
def test_the_first_process_tells_first(rank, monkeypatch, capsys):
    waits = []
    monkeypatch.setenv('RANK', str(rank))
    monkeypatch.setattr('time.sleep', waits.append)

    def main(argv):
        raise UserError('wrong')

    with pytest.raises(SystemExit):
        run_cli(main, 'train.py', [])
    assert len(waits) == rank
    assert capsys.readouterr().err == 'train.py: error: wrong\n'


def test_building_names_the_part():
    message = r'model of c\.py cannot be built: KeyError: Nobody .*TRACEBACK=1'
    with pytest.raises(UserError, match=message), building('The model of c.py'):
        raise KeyError('Nobody')
    with pytest.raises(UserError, match='^as it was$'), building('The model'):
        raise UserError('as it was')
