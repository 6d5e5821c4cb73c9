"""The history page: curves, archives and the pipeline's health in a browser, read only.

`assets` is the page itself, with no history in it; `data` may ask for a token: the page asks its user for one when it
answers 401.
"""

from consumers.web.page.routes import assets, data

__all__ = ["assets", "data"]
