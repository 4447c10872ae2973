"""The little markup in which `openapi.yaml` describes things, as HTML.

    text      = block *( 1*blank-line block )
    block     = list / paragraph
    list      = 1*( "- " inline LF )
    paragraph = 1*( inline LF )
    inline    = *( "`" code "`" / "**" strong "**" / any other character )

This is the part of CommonMark that the contract needs.  Everything is escaped, so a description
can bring no markup of its own.

Source: OpenAPI 3.1.1 §4.6 (rich text), CommonMark 0.31.2.
"""

import re
from typing import Final

from markupsafe import Markup

_BLANK_LINES: Final = re.compile(r"\n\s*\n")
_INLINE: Final = re.compile(r"`(?P<code>[^`]+)`|\*\*(?P<strong>[^*]+)\*\*")
_BULLET: Final = "- "


def blocks(text: str) -> Markup:
    """Paragraphs and lists."""
    return Markup("\n").join(_block(block) for block in _BLANK_LINES.split(text.strip()) if block)


def inline(text: str) -> Markup:
    """One run of text, without a paragraph around it."""
    html = Markup("")
    end = 0
    for match in _INLINE.finditer(text):
        html += text[end : match.start()]
        if match["code"] is not None:
            html += Markup("<code>{}</code>").format(match["code"])
        else:
            html += Markup("<strong>{}</strong>").format(match["strong"])
        end = match.end()
    return html + text[end:]


def _block(block: str) -> Markup:
    lines = block.split("\n")
    if all(line.startswith(_BULLET) for line in lines):
        items = (Markup("<li>{}</li>").format(inline(line[len(_BULLET) :])) for line in lines)
        return Markup("<ul>\n{}\n</ul>").format(Markup("\n").join(items))
    return Markup("<p>{}</p>").format(inline("\n".join(lines)))
