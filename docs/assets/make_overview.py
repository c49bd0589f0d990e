"""Draw overview.svg: what stays with a client, what travels, what the server does. Run: python make_overview.py."""

from pathlib import Path

INK, MUTED, FROZEN, TRAINED, PAPER = "#1f2430", "#5b6472", "#dfe4ec", "#f5a742", "#ffffff"
parts: list[str] = []


def box(x, y, width, height, fill, label="", *, size=14, stroke=INK, color=INK, rx=6):
    parts.append(
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="{rx}" fill="{fill}" stroke="{stroke}" '
        'stroke-width="1.2"/>'
    )
    if label:
        text(x + width / 2, y + height / 2 + size * 0.35, label, size=size, color=color)


def text(x, y, label, *, size=14, color=INK, anchor="middle", weight="normal"):
    parts.append(
        f'<text x="{x}" y="{y}" font-family="Helvetica, Arial, sans-serif" font-size="{size}" fill="{color}" '
        f'text-anchor="{anchor}" font-weight="{weight}">{label}</text>'
    )


def arrow(x1, y1, x2, y2, color=INK):
    parts.append(
        f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{color}" stroke-width="2" marker-end="url(#head)"/>'
    )


def client(x, name, model, width):
    box(x, 200, 250, 218, PAPER, rx=12, stroke=MUTED)
    text(x + 125, 224, name, weight="bold", size=15)
    text(x + 125, 243, model, size=12, color=MUTED)
    left = x + 125 - width / 2
    box(left, 370, width, 30, FROZEN, "A  (r x d)", size=12)
    box(x + 87, 308, 50, 44, TRAINED, "P", size=16)
    box(x + 143, 308, 20, 44, TRAINED, "Q", size=14)
    box(left, 260, width, 30, FROZEN, "B  (d x r)", size=12)
    arrow(x + 125, 369, x + 125, 354)
    arrow(x + 125, 307, x + 125, 292)
    text(x + 125, 440, "own data, own task: stay here", size=12, color=MUTED)


parts.append(
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 860 480" width="860" height="480">'
    '<defs><marker id="head" markerWidth="9" markerHeight="9" refX="7" refY="4" orient="auto">'
    f'<path d="M0,0 L8,4 L0,8 z" fill="{INK}"/></marker></defs><rect width="860" height="480" fill="{PAPER}"/>'
)
box(255, 14, 350, 118, "#eef3fb", rx=12, stroke=MUTED)
text(430, 38, "server", weight="bold", size=15)
text(345, 62, "relevance", size=12, color=MUTED)
shades = [[0, 0.75, 0.2], [0.75, 0, 0.15], [0.2, 0.15, 0]]
for row in range(3):
    for column in range(3):
        level = shades[row][column]
        tone = f"rgb({int(255 - 190 * level)},{int(255 - 140 * level)},{int(255 - 40 * level)})"
        box(316 + 19 * column, 70 + 19 * row, 19, 19, tone, rx=0, stroke="#b9c2d0")
text(505, 78, "each client gets", size=12.5)
text(505, 95, "its own mixture of", size=12.5)
text(505, 112, "the others' P and Q", size=12.5)
for x, name, model, width in (
    (20, "ward 3", "small model, narrow", 120),
    (305, "phone 12", "another family", 170),
    (590, "line 7", "large model, wide", 215),
):
    client(x, name, model, width)
for x in (145, 430, 715):
    target = {145: 290, 430: 430, 715: 570}[x]
    arrow(x - 12, 199, target - 12, 134)
    arrow(target + 12, 134, x + 12, 198)
text(120, 165, "P, Q and a sketch up", size=12, color=MUTED)
text(742, 165, "a personal mixture down", size=12, color=MUTED)
box(262, 456, 14, 14, FROZEN, rx=2)
text(282, 468, "frozen, aligned across models", size=12, anchor="start", color=MUTED)
box(478, 456, 14, 14, TRAINED, rx=2)
text(498, 468, "trained and shared: same size in every model", size=12, anchor="start", color=MUTED)
parts.append("</svg>")
Path(__file__).with_name("overview.svg").write_text("\n".join(parts) + "\n", encoding="utf-8")
