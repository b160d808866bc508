"""A report as one page: self-contained, readable offline, foreign text escaped."""

from __future__ import annotations

from jinja2 import Environment

from alignkit.curation.findings import Report

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ report.rows }} rows: {{ report.findings | length }} findings</title>
<style>
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; margin: .5rem 0 1.5rem; }
td, th { text-align: left; vertical-align: top; padding: .25rem .75rem .25rem 0;
  border-bottom: 1px solid color-mix(in srgb, currentColor 20%, transparent); }
.count { text-align: right; font-variant-numeric: tabular-nums; }
.fault h2::before { content: "✗ "; color: #c62828; }
.look h2::before { content: "? "; color: #b26a00; }
h2 { margin: 2rem 0 .25rem; font-size: 1.1rem; }
code, .text { font: .9em/1.45 ui-monospace, monospace; overflow-wrap: anywhere; }
.dim { opacity: .7; }
</style>
<h1>{{ "{:,}".format(report.rows) }} rows, {{ report.findings | length }} findings</h1>
<p class="dim">{{ report.files | join(", ") }}</p>
<table>
{% for name, value in report.facts.items() %}
<tr><th>{{ name }}</th><td>
{% if value is mapping %}
{% for key, inner in value.items() %}{{ key }} {{ inner }}{{ ", " if not loop.last }}{% endfor %}
{% else %}{{ value }}{% endif %}</td></tr>
{% endfor %}
</table>
{% for one in report.findings %}
<section class="{{ one.weight }}">
<h2>{{ "{:,}".format(one.count) }} {{ one.name }}</h2>
<p>{{ one.why }}. <b>{{ one.mend }}</b>.</p>
<p class="dim"><code>{{ one.places | join(", ") }}
{{- ", …" if one.count > one.places | length }}</code></p>
{% if one.examples %}<table>
{% for example in one.examples %}
<tr>{% for text in example %}<td class="text">{{ text }}</td>{% endfor %}</tr>
{% endfor %}</table>{% endif %}
</section>
{% endfor %}
</html>
"""


def render_page(report: Report) -> str:
    """The report as HTML.

    Args:
        report: of a check.
    """
    page: str = Environment(autoescape=True).from_string(_PAGE).render(report=report)
    return page
