"""The history page: curves, archives and the pipeline's health in a browser, read only.

`router` is everything. `assets` (the page itself, no history in it) and `data` are its two halves, for an app that asks
for a token: the page asks its user for one when `data` answers 401.
"""

from consumers.page.routes import assets, data, router

__all__ = ["assets", "data", "router"]
