"""Light and dark: the colours of the pictures as variables of the page, which are others on a dark screen."""

from __future__ import annotations

import re

# Colours that the pictures are drawn in -> the same on a dark ground: greys are turned over, hues made lighter.
DARK = {
    "#ffffff": "#1c232d",
    "#000000": "#e3e8ee",
    "#222222": "#e3e8ee",
    "#444444": "#c3cad3",
    "#e6e6e6": "#38424f",
    "#f4f4f4": "#262f3b",
    "#e4ecf5": "#2d3b4d",
    "#5b6b7f": "#91a4bb",
    "#6b6b6b": "#a9b1bb",
    "#8a8a8a": "#9aa3ae",
    "#9c9c9c": "#7f8893",
    "#a0a0a0": "#858e99",
    "#0072b2": "#62b6f0",
    "#d55e00": "#ff9550",
    "#009e73": "#3ecfa3",
    "#cc79a7": "#e9a6c9",
    "#9b4f96": "#d199cd",
}


def themed(svg: str) -> str:
    """SVG whose colours are variables, with the light ones where nobody sets them; text and ids stay as they are.

    >>> themed('<path style="fill: #ffffff; stroke: #123456"/><text>#ffffff</text>')
    '<path style="fill: var(--ffffff, #ffffff); stroke: #123456"/><text>#ffffff</text>'
    """

    def variable(match: re.Match[str]) -> str:
        return f"var(--{match[0][1:]}, {match[0]})" if match[0] in DARK else match[0]

    return re.sub(r'style="[^"]*"', lambda style: re.sub(r"#[0-9a-f]{6}\b", variable, style[0]), svg)
