"""`python -m polytower.documents` writes all generated pages."""

from polytower.documents import PAGES, text_of

for path in PAGES:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text_of(path))
