"""Sphinx's settings, for `make docs`: nothing is fetched and no notebook is run."""

import re
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import imaml_jax  # noqa: E402

project = "imaml_jax"
author = copyright = "The imaml_jax authors"
version = release = imaml_jax.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]
html_theme = "furo"
html_title = f"imaml_jax {version}"
html_copy_source = False
html_math_renderer = "mathml"
html_css_files, html_static_path = ["mathml.css"], ["static"]
pygments_style, pygments_dark_style = "friendly", "monokai"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"
nitpick_ignore_regex = [("myst", r"(\.\./)*experiments/results(/\w+)?")]  # see without_folders
suppress_warnings = ["myst.header"]  # a section of the README may begin at its third level

add_module_names = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
default_role = "py:obj"  # `name` in a docstring links to what it names, and is code elsewhere
maximum_signature_line_length = 88
napoleon_attr_annotations = False
napoleon_numpy_docstring = False
napoleon_use_ivar = True


def visit_math(translator, node, *, block):
    """MathML, which browsers render by themselves: the pages need neither scripts nor a network."""
    from docutils.nodes import SkipNode
    from docutils.utils.math.latex2mathml import tex2mathml

    translator.body.append(tex2mathml(node.astext(), as_block=block))
    raise SkipNode


def resolve_short_name(app, env, node, contnode):
    """Links `solve_cg`, `imaml_jax.solve_cg` and `linear_solve.solve_cg` to the one that exists."""
    name = node.get("reftarget", "").removeprefix("imaml_jax.")
    if node.get("reftype") != "obj" or not re.fullmatch(r"\w+(\.\w+)*", name):
        return None
    domain = env.get_domain("py")
    found = [full for full in domain.objects if full.endswith("." + name)]
    # A learner's module has its name.
    found = [full for full in found if domain.objects[full].objtype != "module"] or found
    if len(found) != 1:
        return None
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", found[0], node, contnode)


def skip_field(app, what, name, obj, skip, options):
    """Leaves out the fields of a NamedTuple, which its docstring describes."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def without_badge(app, docname, source):
    """A notebook's badge is an image on another host."""
    source[0] = source[0].replace("[![Open in Colab][badge]]", "[Open in Colab]")


def without_folders(app, doctree, docname):
    """The README links to folders of the repository, which the pages do not have."""
    from docutils.nodes import reference

    for node in list(doctree.findall(reference)):
        if re.match(r"#(\.\./)*experiments/", node.get("refuri", "#" + node.get("refid", ""))):
            node.replace_self(node.children)


def setup(app):
    """Called by Sphinx."""
    inline, block = (partial(visit_math, block=is_block) for is_block in (False, True))
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    app.connect("missing-reference", resolve_short_name)
    app.connect("autodoc-skip-member", skip_field)
    app.connect("source-read", without_badge)
    app.connect("doctree-resolved", without_folders)
