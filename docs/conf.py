"""The documentation site, for `make docs`."""

from typing import NamedTuple

from spvit_mm import __version__

project = 'spvit_mm'
release = __version__
extensions = [
    'myst_parser',
    'sphinx.ext.autodoc',
    'sphinx.ext.mathjax',
    'sphinx.ext.napoleon',
]
exclude_patterns = ['_build']
html_theme = 'furo'
html_title = f'spvit_mm {release}'
# Links to headings work as on GitHub, down to this level.
myst_heading_anchors = 3
autodoc_default_options = {'members': True, 'show-inheritance': True}
# An overridden method without words of its own adds nothing to its base's.
autodoc_inherit_docstrings = False
autodoc_typehints = 'description'
autodoc_typehints_description_target = 'documented'
# What a class says of its attributes is not said again where they are defined.
napoleon_use_ivar = True
ALIAS = type(NamedTuple('Pair', [('first', int)]).first)


def skip_fields(app, what, name, member, skip, options):
    """Leave out the fields of a NamedTuple, "Alias for field number 0"."""
    return True if isinstance(member, ALIAS) else None


def formulas_as_written(app, what, name, member, options, lines):
    """Indented paragraphs of our docstrings are formulas, not quotations."""
    for i in range(len(lines) - 2, 0, -1):
        before, line, after = lines[i - 1 : i + 2]
        text = before[:1].strip() and not before.startswith('.. ')
        if text and not before.endswith('::') and not line and after.startswith('  '):
            lines[i:i] = ['', '::']


def setup(app):
    app.connect('autodoc-skip-member', skip_fields)
    # Before napoleon (priority 500) indents what it makes of the sections.
    app.connect('autodoc-process-docstring', formulas_as_written, priority=400)
