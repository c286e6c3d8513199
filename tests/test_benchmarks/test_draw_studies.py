import re

import draw_studies


def test_figures_are_drawn_from_the_csvs(tmp_path, capsys):
    draw_studies.main(['--out-dir', str(tmp_path)])
    drawn = {path.name for path in tmp_path.glob('*.png')}
    assert {'prior.png', 'training.png', 'start_search.png'} <= drawn
    kept = {path.name for path in draw_studies.STUDIES.glob('*.png')}
    assert drawn <= kept
    text = (draw_studies.STUDIES.parent / 'studies.md').read_text()
    assert drawn <= set(re.findall(r'\(studies/(\w+\.png)\)', text))


def test_every_result_is_linked_and_there():
    docs = draw_studies.STUDIES.parent
    links = set()
    for page in ('studies.md', 'resolution.md'):
        links |= set(re.findall(r'\(studies/([\w.-]+)\)', (docs / page).read_text()))
    there = {path.name for path in draw_studies.STUDIES.iterdir()}
    of_sizes = {name for name in there if re.fullmatch(r'resolution_\w+\.csv', name)}
    assert links == there - of_sizes
