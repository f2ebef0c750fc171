"""What all pages of eyespot have in common: style and skeleton, readable in light and dark, on paper and on a phone."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

STYLE = """
:root{color-scheme:light dark;--page:#faf9f6;--card:#fff;--ink:#1c1f24;--soft:#59606b;--line:#e3e0d9;
--accent:#0a6c74;--quiet:#a9b3bb;--right:#146c43;--wrong:#b02a1f;--right-bg:#e9f4ee;--wrong-bg:#fbecea;
--warn:#8a5300;--warn-bg:#fdf3e1}
@media (prefers-color-scheme:dark){:root{--page:#14161a;--card:#1c1f25;--ink:#e9e8e4;--soft:#a4abb6;--line:#30343c;
--accent:#58c4c4;--quiet:#59636f;--right:#74d3a0;--wrong:#ff9d92;--right-bg:#16281f;--wrong-bg:#311d1c;
--warn:#f0b860;--warn-bg:#2e2415}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1040px;margin:0 auto;padding:clamp(24px,6vw,72px) clamp(16px,4vw,40px)}
h1{font-size:clamp(1.6rem,5vw,2.3rem);line-height:1.2;font-weight:650;letter-spacing:-.015em;margin:0 0 6px;
overflow-wrap:anywhere}
h2{font-size:1.25rem;font-weight:650;margin:0 0 6px}
section{margin-top:clamp(40px,7vw,64px)}
p{margin:0 0 12px;max-width:68ch;overflow-wrap:anywhere}
.soft,figcaption,caption{color:var(--soft);font-size:.9rem}
.headline{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr));gap:32px;margin-top:36px;
align-items:center}
.number{font-size:clamp(3.2rem,12vw,5rem);line-height:1;font-weight:680;letter-spacing:-.03em;
font-variant-numeric:tabular-nums}
.number small{font-size:.42em;font-weight:500;letter-spacing:0;color:var(--soft)}
.verdict{border-left:4px solid var(--soft);padding:4px 0 4px 16px;margin-top:24px;max-width:62ch}
.verdict strong{display:block;font-size:1.1rem}
.warnings{margin-top:28px;padding:14px 18px;border-radius:10px;background:var(--warn-bg);color:var(--warn);
overflow-wrap:anywhere}
.warnings ul{margin:6px 0 0;padding-left:1.2em;color:var(--ink)}
.verdict.right{border-color:var(--right)}.verdict.wrong{border-color:var(--wrong)}
figure{margin:0}figcaption{margin-top:6px}svg{display:block;width:100%;overflow:visible}
svg text{fill:var(--ink);font-family:inherit}svg .tick{fill:var(--soft)}
.bar{fill:var(--quiet)}.bar.main{fill:var(--accent)}.track,.grid{stroke:var(--line)}
.track{fill:var(--line);stroke:none;opacity:.55}.whisker{stroke:var(--ink);stroke-width:2}
.curve{fill:none;stroke:var(--accent);stroke-width:2;stroke-linejoin:round}
.diagonal{stroke:var(--soft);stroke-dasharray:4 4}.dot{fill:var(--accent);fill-opacity:.8}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,205px),1fr));gap:20px;margin:20px 0 0;
padding:0;list-style:none}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;overflow:hidden;display:flex;
flex-direction:column}
.card img{display:block;width:100%;height:180px;object-fit:contain;background:var(--line)}
.cards.wide{grid-template-columns:repeat(auto-fill,minmax(min(100%,320px),1fr))}
.both{display:grid;grid-template-columns:1fr 1fr;gap:2px;background:var(--line)}.cards+p{margin-top:14px}
.both img{height:auto;aspect-ratio:1}
.card .none{height:72px;display:grid;place-items:center;background:var(--line);color:var(--soft);font-size:.9rem}
.card .pixels{image-rendering:pixelated}
.card .body{padding:14px 16px 16px;display:flex;flex-direction:column;gap:10px;flex:1}
.question{font-weight:600;line-height:1.35;overflow-wrap:anywhere;margin:0}
dl.answers{display:grid;grid-template-columns:auto 1fr;gap:3px 12px;margin:0;font-size:.93rem}
dl.answers dt{color:var(--soft)}dl.answers dd{margin:0;overflow-wrap:anywhere}
.mark{border-radius:5px;padding:1px 7px;font-weight:600}
.mark.right{color:var(--right);background:var(--right-bg)}.mark.wrong{color:var(--wrong);background:var(--wrong-bg)}
.aside{color:var(--soft)}
.scroll{overflow-x:auto;margin-top:12px}
table{border-collapse:collapse;width:100%;font-size:.95rem;font-variant-numeric:tabular-nums}
caption{text-align:left;padding-bottom:6px}
th,td{text-align:left;padding:8px 20px 8px 0;border-bottom:1px solid var(--line);vertical-align:top}
thead th{color:var(--soft);font-weight:500;font-size:.87rem}tbody th{font-weight:500}
td.n,th.n{text-align:right}td.n{white-space:nowrap}.scroll+p{margin-top:14px}.scroll+.scroll{margin-top:32px}
th:last-child,td:last-child{padding-right:0}
.matrix{width:auto}.matrix td,.matrix th{padding:6px 8px}.matrix th:first-child{padding-left:0}
.matrix td{text-align:right}@media (max-width:480px){.matrix{font-size:.8rem}.matrix td,.matrix th{padding:5px}}
.wrap{max-width:620px}.wrap td:not(.n),.wrap tbody th{overflow-wrap:anywhere}
.matrix thead th+th{vertical-align:bottom;padding-bottom:8px}
.matrix thead th span{writing-mode:vertical-rl;transform:rotate(180deg);max-height:9em}
.columns{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,380px),1fr));gap:28px 44px;margin-top:12px}
.columns>*{min-width:0}.columns .scroll{margin:0}
pre{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 16px;overflow-x:auto;
font:.9rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;margin:12px 0}
.hidden{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap}
@media print{body{background:#fff}.card{break-inside:avoid}}
"""


def whole_page(title: str, body: str) -> str:
    """A page around its content, without scripts and without anything from outside; title is plain text."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        "</body>\n</html>\n"
    )


def section(heading: str, *parts: str) -> str:
    """Parts and heading are HTML."""
    return f"<section><h2>{heading}</h2>{''.join(parts)}</section>"


def soft(words: str) -> str:
    """A quiet paragraph of plain text."""
    return f'<p class="soft">{escape(words)}</p>'


def fact(value: object) -> str:
    """A setting or a count as plain text."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={entry}" for name, entry in value.items()) or "none"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
