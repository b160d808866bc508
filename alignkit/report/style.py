"""How a page looks: light and dark, on a screen, a phone and paper."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --ink: #333; --grid: #ddd; --line: #ddd; --soft: #f5f5f5;
  --curve-0: #1f5fa8; --curve-1: #c8501e; --curve-2: #2e7d32; --curve-3: #7b3fa0;
  --curve-4: #8d6e00; --curve-5: #00838f; --curve-6: #ad1457; --curve-7: #5d4037;
  font: 16px/1.5 system-ui, sans-serif; }
@media (prefers-color-scheme: dark) { :root { --ink: #ccc; --grid: #3a3a3a; --line: #3a3a3a;
  --soft: #222; --curve-0: #6fb1ff; --curve-1: #ff9a6b; --curve-2: #7cc97f; --curve-3: #c99bea;
  --curve-4: #d8b64a; --curve-5: #4dd0e1; --curve-6: #f48fb1; --curve-7: #bcaaa4; } }
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; }
h3 { font-size: 1rem; margin: 0; }
p, ul { margin: .4rem 0; } .dim { opacity: .75; }
table { border-collapse: collapse; margin: .5rem 0; }
td, th { text-align: left; vertical-align: top; padding: .2rem 1rem .2rem 0;
  border-bottom: 1px solid var(--line); }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(26rem, 100%), 1fr));
  gap: 1.5rem; }
figure { margin: 0; break-inside: avoid; } figure svg { width: 100%; height: auto; display: block; }
figcaption { font-size: .9rem; }
.key { white-space: nowrap; margin-right: 1rem; font: .85rem ui-monospace, monospace; }
.key::before { content: ""; display: inline-block; width: 1.2em; height: .2em; margin-right: .4em;
  vertical-align: middle; background: var(--colour); }
pre, code, .text { font: .85rem/1.45 ui-monospace, monospace; overflow-wrap: anywhere; }
pre { background: var(--soft); padding: .75rem; overflow-x: auto; white-space: pre-wrap; }
.status { font-size: .9rem; border: 1px solid var(--line); border-radius: 1em; padding: 0 .7em; }
.finished { color: var(--curve-2); } .failed, .interrupted { color: var(--curve-1); }
details { margin: .5rem 0; } summary { cursor: pointer; }
@media print { body { max-width: none; margin: 0; } details > * { display: revert; }
  .figures { grid-template-columns: 1fr 1fr; } }
"""
"""Style sheet of every page."""

MACROS = """
{% macro figure(one) %}
<figure>
<h3>{{ one.title }}</h3>
{{ one.svg | safe }}
<div>{% for name, colour in one.key %}
<span class="key" style="--colour: var(--curve-{{ colour }})">{{ name }}</span>{% endfor %}</div>
<figcaption class="dim">{{ one.healthy }}</figcaption>
</figure>
{% endmacro %}
{% macro pairs(rows) %}
<div class="wide"><table>
{% for name, value in rows %}<tr><th>{{ name }}</th><td>{{ value }}</td></tr>
{% endfor %}</table></div>
{% endmacro %}
"""
"""Parts that pages share."""

HEAD = """<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{{ title }}</title>
<style>{{ style | safe }}</style>
"""
"""Of every page: nothing is fetched, and no script runs."""
