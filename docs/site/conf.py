"""Sphinx's settings for the site (docs/site/build.py lays its pages out)."""

project = "Persona Features"
author = "the Persona Features authors"
copyright = "the authors; MIT licence"
extensions = ["myst_nb"]
nb_execution_mode = "off"  # the notebooks are committed with their outputs
nb_mime_priority_overrides = [("html", "text/html", 0)]
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 4
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb"}
suppress_warnings = ["myst.header", "myst.xref_missing", "mystnb.unknown_mime_type"]
html_theme = "sphinx_book_theme"
html_title = "Persona Features"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_extra_path = ["extra"]
html_copy_source = False
html_context = {"default_mode": "auto"}
html_theme_options = {
    "navbar_persistent": [],
    "navbar_end": [],
    "repository_url": "https://github.com/persona-features/persona-features",
    "repository_branch": "main",
    "path_to_docs": "notebooks",
    "use_repository_button": True,
    "use_download_button": True,
    "home_page_in_toc": True,
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "launch_buttons": {
        "binderhub_url": "https://mybinder.org",
        "colab_url": "https://colab.research.google.com",
    },
}
