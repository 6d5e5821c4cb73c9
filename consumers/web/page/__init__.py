"""The history page: curves, archives and the pipeline's health in a browser, read-only.

`assets` serves the page's files, which contain no history. `data` serves the history and may require a token: if it
answers 401, the page asks its user for the token.
"""

from consumers.web.page.routes import assets, data

__all__ = ["assets", "data"]
