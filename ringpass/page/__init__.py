"""The page: one self-contained HTML file that shows what a graph became on each rank, made of data and texts alone.

>>> html = render({"version": 1, "model": "GPT", "world": 2, "graphs": []}, {"captured.py": "x = 1"})
>>> html.startswith("<!doctype html>"), "<title>GPT on 2 ranks" in html
(True, True)

`render` reads no plan and no graph.  Any part of the report may be missing; its panel then says so.
"""

from ringpass.page.render import render

__all__ = ["render"]
