"""Reads a page as a browser does, and stumbles where its tags do not match."""

from html.parser import HTMLParser

VOID = {"meta", "img", "source", "link", "br", "hr", "input"}
CELLS = {"td", "th", "dt", "dd"}


class Page(HTMLParser):
    """A page's tags, attributes and visible text; nesting is checked while it is read."""

    def __init__(self, html):
        super().__init__()
        self.html = html
        self.attributes = []
        self.tags = []
        self.open = []
        self.texts = {}
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag in CELLS:
            self.handle_data(" ")

    def handle_data(self, data):
        if "style" not in self.open:
            for tag in {*self.open}:
                self.texts[tag] = self.texts.get(tag, "") + data

    @property
    def text(self):
        return " ".join(self.texts["body"].split())

    @property
    def verdict(self):
        return " ".join(self.text.split("Results")[0].split())
