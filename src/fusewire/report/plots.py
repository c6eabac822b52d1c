"""Plots as SVG for the page, in colours that follow the page's light or dark theme."""

from __future__ import annotations

import html
import io
import re

# Stand-ins that matplotlib writes, and the page's variables that replace them: one picture serves both themes.
COLOURS = {"ink": "#010101", "muted": "#020202", "line": "#030303", "stock": "#040404", "compile": "#050505", "exact": "#060606",
           "close": "#070707", "floor": "#080808", "k1": "#090909", "k2": "#0a0a0a", "k3": "#0b0b0b", "k4": "#0c0c0c", "k5": "#0d0d0d"}
SERIES = {"eager": "stock", "stock": "stock", "compile": "compile", "exact": "exact", "close": "close"}
KIND_COLOURS = {"attention": "k1", "linears": "k2", "convolutions": "k3", "norms and modulation": "k4", "other": "k5",
                "text encoders": "k4", "denoiser": "k2", "scheduler": "k1", "VAE": "k3"}
NAMES = {"eager": "eager", "compile": "torch.compile", "exact": "exact", "close": "close", "stock": "stock"}


def _figure(width: float, height: float):
    """A figure of ``width`` x ``height`` points, drawn without any window."""
    import matplotlib

    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "fusewire", "font.size": 9.5, "axes.edgecolor": COLOURS["line"],
                                "text.color": COLOURS["ink"], "axes.labelcolor": COLOURS["muted"], "xtick.color": COLOURS["muted"],
                                "ytick.color": COLOURS["muted"], "axes.spines.top": False, "axes.spines.right": False,
                                "axes.titlesize": 9.5, "axes.titlelocation": "left"})
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
    FigureCanvasSVG(figure)
    return figure


def _svg(figure, label: str) -> str:
    """The figure as an inline ``<svg>``: scaled by the page, read out as ``label``."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg"):]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    label = html.escape(label)
    text = re.sub(r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', lambda found: f'<svg viewBox="{found[1]}" role="img" aria-label="{label}">', text, count=1)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    text = re.sub(r"font-family: [^;\"]*;?", "", text)
    for name, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    return text


def error_curves(curves: dict[str, list[float]], against: str) -> str:
    """Relative error after each step, on a logarithmic axis; a variant that never differs is named instead of drawn."""
    figure = _figure(330, 215)
    axes = figure.subplots()
    equal, lines = [], 0
    for label, values in curves.items():
        variant, _, other = label.partition(" against ")
        if other != against:
            continue
        if not any(values):
            equal.append(NAMES[variant])
            continue
        # exact is drawn last and dashed: on top of stock it shows that both are the same line
        dashes = {"stock": "-", "exact": (0, (4, 3)), "close": "-"}[variant]
        axes.semilogy(range(1, len(values) + 1), [value or float("nan") for value in values], color=COLOURS[SERIES[variant]], linestyle=dashes,
                      marker="o" if len(values) < 3 else None, linewidth=1.8, label=NAMES[variant], zorder=3 if variant == "exact" else 2)
        lines += 1
    axes.set_xlabel("denoising step")
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.set_title(f"relative error against {against}", color=COLOURS["muted"])
    axes.grid(axis="y", color=COLOURS["line"], linewidth=0.6)
    if equal:
        where = dict(x=0.98, y=0.06, ha="right", va="bottom") if lines else dict(x=0.5, y=0.5, ha="center", va="center")
        axes.text(s=f"{' and '.join(equal)}: 0 at every step", transform=axes.transAxes, color=COLOURS["exact"], **where)
    if lines:
        axes.legend(frameon=False, ncols=3, loc="lower center" if not equal else "upper left", handlelength=2.2)
    else:
        axes.set_yticks([])
        axes.set_yscale("linear")
    return _svg(figure, f"relative error against {against} after each step")


def stacked_bars(parts: dict[str, dict[str, float]], label: str, unit: str = "ms") -> str:
    """One bar for each variant, divided into its kinds or stages."""
    figure = _figure(330, 54 + 26 * len(parts))
    axes = figure.subplots()
    names = list(parts)
    for kind in parts[names[0]]:
        starts = [sum(list(parts[v].values())[:list(parts[v]).index(kind)]) for v in names]
        axes.barh([NAMES[v] for v in names], [parts[v][kind] for v in names], left=starts, color=COLOURS[KIND_COLOURS[kind]], height=0.62)
    longest = max(sum(spent.values()) for spent in parts.values())
    for i, v in enumerate(names):
        total = sum(parts[v].values())
        axes.text(total + 0.015 * longest, i, f"{total:.0f}", va="center", color=COLOURS["ink"])
    axes.set_xlim(0, 1.12 * longest)
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0, labelcolor=COLOURS["ink"])
    return _svg(figure, label)


def side_bars(medians: dict[str, float], low: dict[str, float], high: dict[str, float], floor: float, label: str) -> str:
    """One bar for each side with its quartiles, and the floor as a line; milliseconds."""
    figure = _figure(330, 62 + 26 * len(medians))
    axes = figure.subplots()
    longest = max(max(high.values()), floor)
    for i, (variant, value) in enumerate(medians.items()):
        axes.barh(i, value, color=COLOURS[SERIES[variant]], height=0.62)
        axes.plot([low[variant], high[variant]], [i, i], color=COLOURS["ink"], linewidth=1.2)
        axes.text(max(value, high[variant]) + 0.015 * longest, i, f"{value:.0f}", va="center", color=COLOURS["ink"])
    axes.axvline(floor, color=COLOURS["floor"], linestyle=(0, (3, 2)), linewidth=1.4)
    axes.text(floor + 0.015 * longest, -0.62, f"floor {floor:.0f}", color=COLOURS["floor"], ha="left", va="bottom", fontsize=8.5)
    axes.set_yticks(range(len(medians)), [NAMES[v] for v in medians])
    axes.set_ylim(len(medians) - 0.5, -1.0)
    axes.set_xlim(0, 1.14 * longest)
    axes.set_xlabel("ms per call")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0, labelcolor=COLOURS["ink"])
    return _svg(figure, label)
