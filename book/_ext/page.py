"""Sphinx extension of the book: the notebook behind the download button, the status page's table."""

from pathlib import Path

import jupytext
import nbformat
from docutils import nodes
from sphinx.util.docutils import SphinxDirective

PACKAGES = (
    "tensorflow",
    "keras",
    "tf_keras",
    "tensorflow-model-optimization",
    "ai-edge-litert",
    "numpy",
    "scipy",
    "scikit-learn",
    "jupyter-book",
)


def add_notebook_button(app, pagename, templatename, context, doctree):
    """Offers each chapter as a notebook, which the theme does only for .ipynb sources."""
    source = Path(app.srcdir, f"{pagename}.py")
    if source.exists():
        context["ipynb_source"] = f"{pagename}.ipynb"
        target = Path(app.outdir, "_sources", f"{pagename}.ipynb")
        target.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(jupytext.read(source, fmt="py:percent"), target)


def drop_thebe(app, pagename, templatename, context, doctree):
    """Takes out the scripts of sphinx-thebe, which Jupyter Book loads whether it is used or not.

    They name a CDN, and stand twice on a page, which makes the second a syntax error.
    """
    context["script_files"] = [
        script
        for script in context["script_files"]
        if "thebe" not in f"{script.filename} {script.attributes.get('body')}".lower()
    ]


def skip_field_aliases(app, what, name, obj, skip, options):
    """Leaves out the fields of named tuples, whose docstrings Python makes of their numbers."""
    return True if (obj.__doc__ or "").startswith("Alias for field number") else None


class VersionsDirective(SphinxDirective):
    """`{versions}`: the packages and the machine with which the chapters were executed."""

    def run(self):
        import importlib.metadata

        from accel_tf.benchmark import host

        rows = [(name, importlib.metadata.version(name)) for name in PACKAGES]
        rows = [("Machine", str(host())), *rows]
        table = nodes.table(classes=["colwidths-auto"])
        group = nodes.tgroup(cols=2)
        table += group
        group += [nodes.colspec(colwidth=1), nodes.colspec(colwidth=3)]
        body = nodes.tbody()
        group += body
        for row in rows:
            line = nodes.row()
            for cell in row:
                line += nodes.entry("", nodes.paragraph(text=cell))
            body += line
        return [table]


def setup(app):
    """Registers the extension."""
    app.connect("html-page-context", add_notebook_button, priority=400)
    app.connect("autodoc-skip-member", skip_field_aliases)
    app.connect("html-page-context", drop_thebe, priority=900)
    app.add_directive("versions", VersionsDirective)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
