"""The page: one HTML file that holds its style, plots and pictures, and needs no network."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Sequence
from pathlib import Path

from fusewire.parity.result import SCHEMA, ParityResult, plain
from fusewire.profile.result import ProfileResult
from fusewire.report import images, plots, tables

HERE = Path(__file__).parent


def report_dict(parities: list[ParityResult], profiles: list[ProfileResult], *, command: str, seconds: float, lacking: Sequence[str] = ()) -> dict:
    """What report.json holds. lacking: the results that an interrupt prevented, in words."""
    return plain({"kind": "report", "schema": SCHEMA, "ok": not lacking and all(result.ok for result in (*parities, *profiles)), "interrupted": bool(lacking),
                  "lacking": list(lacking), "command": command, "seconds": round(seconds, 1), "parity": [result.to_dict() for result in parities],
                  "profile": [result.to_dict() for result in profiles]})


def write(folder: Path, parities: list[ParityResult], profiles: list[ProfileResult], *, command: str, seconds: float, lacking: Sequence[str] = ()) -> Path:
    """Write ``index.html`` and ``report.json`` into ``folder``; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    told = dict(command=command, seconds=seconds, lacking=lacking)
    (folder / "report.json").write_text(json.dumps(report_dict(parities, profiles, **told), indent=1) + "\n")
    page = folder / "index.html"
    page.write_text(render(parities, profiles, **told), encoding="utf-8")
    return page


def render(parities: list[ParityResult], profiles: list[ProfileResult], *, command: str, seconds: float, lacking: Sequence[str] = ()) -> str:
    """The page as a string."""
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, trim_blocks=True)
    machine = (parities or profiles)[0].machine
    return environment.get_template("page.html").render(
        css=(HERE / "page.css").read_text(), target=(parities or profiles)[0].target, tiles=tiles(parities, profiles),
        failed=failures(parities, profiles), galleries=[gallery(p) for p in parities if p.pictures], gradient=images.gradient(),
        curves=[plot for p in parities for plot in curve_plots(p)], speeds=speeds(profiles), shares=shares(profiles),
        worst=[_cells(row, f"{p.target}, {p.dtype}") for p in parities for row in tables.summary(p.rows)],
        parity=[dict(title=f"{p.target}, {p.dtype}", count=_held(p.rows), rows=[_cells(row, "") for row in p.rows]) for p in parities],
        swaps=[_swap_table(p) for p in parities], command=command, lacking=lacking, minutes=f"{seconds / 60:.1f}",
        date=datetime.date.today().isoformat(), facts=facts(machine, parities))


def _held(rows) -> str:
    return f"{sum(row.holds for row in rows)} of {len(rows)} hold"


def tiles(parities: list[ParityResult], profiles: list[ProfileResult]) -> list[dict]:
    """The figures at the head of the page."""
    found = []
    rows = [row for p in parities for row in p.rows if row.level == "picture"]
    exact = [row for row in rows if row.numerics == "exact"]
    if exact:
        equal = sum(row.equal for row in exact)
        found.append(dict(big=f"{equal} of {len(exact)}", tone="good" if equal == len(exact) else "bad",
                          small=f"exact runs whose final latents and picture equal stock’s bit for bit ({_dtypes(exact)})"))
    for dtype in dict.fromkeys(row.dtype for row in rows):
        close = [row for row in rows if row.numerics == "close" and row.dtype == dtype]
        if close:
            worst = min((row.psnr for row in close), key=lambda decibel: -math.inf if math.isnan(decibel) else decibel)
            found.append(dict(big=f"{worst:.0f} dB" if math.isfinite(worst) else "NaN" if math.isnan(worst) else "equal",
                              tone="good" if all(r.holds for r in close) else "bad",
                              small=f"lowest PSNR of a close picture against stock’s, {dtype}"))
    for profile in profiles:
        close, compiled = profile.row("close"), profile.row("compile")
        if close is not None and not profile.stages:
            found.append(dict(big=f"{close.against_eager:.2f}x", tone="good" if close.against_eager > 1 else "bad",
                              small=f"the speed of eager: {profile.target} in {profile.dtype}, close"
                                    + (f"; {close.against_compile:.2f}x that of torch.compile" if compiled else "")))
    first = [row.extra_first_ms for p in profiles for row in p.rows if row.variant in ("exact", "close")]
    if first:
        found.append(dict(big=f"{max(0.0, max(first)) / 1e3:.2f} s", tone="", small="longest extra time of a first call after swap: no compile step"
                          + _compile_time(profiles)))
    return found


def _dtypes(rows) -> str:
    return " and ".join(dict.fromkeys(row.dtype for row in rows))


def _compile_time(profiles: list[ProfileResult]) -> str:
    times = [row.extra_first_ms for p in profiles for row in p.rows if row.variant == "compile"]
    return f" (torch.compile: {max(times) / 1e3:.0f} s)" if times else ""


def failures(parities: list[ParityResult], profiles: list[ProfileResult]) -> list[dict]:
    """Every verdict that does not hold."""
    found = [dict(where=f"{p.target}, {p.dtype}", what=f"{row.level} {row.name}, {row.numerics}", why=row.reason) for p in parities for row in p.failed]
    return found + [dict(where=f"{p.target}, {p.dtype}", what=v.name, why=v.detail) for p in profiles for v in p.verdicts if not v.holds]


def gallery(result: ParityResult) -> dict:
    """The pictures of one parity result: a card for each seed, with difference maps on one scale."""
    variants = result.pictures.variants
    stock = variants["stock"]
    swapped = [name for name in ("exact", "close") if name in variants]
    differences = {name: [images.difference(a, b) for a, b in zip(variants[name], stock)] for name in swapped}
    largest = max(float(d.max()) for name in swapped for d in differences[name])
    decibels = {(row.numerics, i): row.psnr for name in swapped
                for i, row in enumerate(r for r in result.rows if r.level == "picture" and r.numerics == name)}
    cards = []
    for i, (seed, prompt) in enumerate(zip(result.pictures.seeds, result.pictures.prompts)):
        views = [dict(src=images.data_uri(stock[i]), alt=f"stock: {prompt}", caption="stock")]
        maps = []
        for name in swapped:
            views.append(dict(src=images.data_uri(variants[name][i]), alt=f"{name}: {prompt}", caption=name))
            psnr = decibels.get((name, i))
            text = "equal" if psnr == math.inf else "NaN" if psnr is None or math.isnan(psnr) else f"{psnr:.1f} dB"
            maps.append(dict(src=images.data_uri(images.heat(differences[name][i], largest)), alt=f"difference of {name} to stock", caption=text))
        cards.append(dict(views=views, differences=maps, prompt=prompt, seed=seed))
    steps, guidance = result.settings["steps"], result.settings["guidance"]
    small = max(stock.shape[-2:]) <= 64
    levels = f", {255 * largest:.2g} of 255 levels" if largest else ""
    return dict(title=f"{result.target}, {result.dtype}", cards=cards, fit="small" if small else "", scale=f"{largest:.2g} of full brightness{levels}",
                note=f"{steps} steps, guidance {guidance:g}, {stock.shape[-1]} x {stock.shape[-2]} pixels. Below each picture, where it differs from stock’s "
                     "(the largest of the three colours); the dB are PSNR against stock.")


def curve_plots(result: ParityResult) -> list[dict]:
    """Error against stock and against float64, after each step."""
    sides = [side for side in ("stock", "float64") if any(label.endswith(f"against {side}") for label in result.curves)]
    return [dict(title=f"{result.target}, {result.dtype}", svg=plots.error_curves(result.curves, side)) for side in sides]


def speeds(profiles: list[ProfileResult]) -> list[dict]:
    """One part for each target: its dtypes side by side."""
    found = []
    for target in dict.fromkeys(p.target for p in profiles):
        group = [p for p in profiles if p.target == target]
        compiled = any(p.row("compile") for p in group)
        heads = [dict(text="median ms"), dict(text="quartiles ms", spare=True), dict(text="x eager"),
                 *([dict(text="x compile")] if compiled else []), dict(text="x floor", spare=True), dict(text="first call ms", spare=True),
                 dict(text="peak MiB", spare=True)]
        rows = [row for p in group for row in _speed_rows(p, compiled)]
        floors = "; ".join(f"{p.floor['gflop']:.3g} GFLOP at {p.floor['gemm_gflops']:.0f} GFLOP/s and {p.floor['bandwidth_gbs']:.1f} GB/s in {p.dtype}"
                           for p in group)
        notes = " ".join(dict.fromkeys(note + "." for p in group for note in p.notes))
        found.append(dict(
            title=target, heads=heads, rows=rows, memory_heads=tables.MEMORY, memory=[row for p in group for row in _memory_rows(p)],
            kept=kept(group),
            note=f"{group[0].description}. {_what_runs(group[0])} The floor: {floors}, the rates of this machine’s best matrix product and of a copy. {notes}",
            plots=[dict(title=f"{p.dtype}", svg=plots.side_bars({r.variant: r.median_ms for r in p.rows}, {r.variant: r.low_ms for r in p.rows},
                                                                {r.variant: r.high_ms for r in p.rows}, p.floor["roofline_ms"],
                                                                f"milliseconds per call of {target} in {p.dtype}")) for p in group]))
    return found


def _speed_rows(p: ProfileResult, compiled: bool) -> list[dict]:
    """One line for each side of a profile, then the floor. "x floor": how many times the floor's time a side takes."""
    rows = []
    for row in p.rows:
        cells = [f"{row.median_ms:.1f}", f"{row.low_ms:.1f}–{row.high_ms:.1f}", f"{row.against_eager:.2f}",
                 *([("" if row.against_compile is None else f"{row.against_compile:.2f}")] if compiled else []),
                 f"{1 / row.floor_share:.2f}" if row.floor_share else "", f"{row.first_ms:.0f}", "" if row.peak_mib is None else f"{row.peak_mib:.0f}"]
        rows.append(dict(dtype=p.dtype, name=tables.NAMES[row.variant], colour=plots.SERIES[row.variant], cells=cells, best=row.variant == "close"))
    floor, compile_row = p.floor["roofline_ms"], p.row("compile")
    cells = [f"{floor:.1f}", "", f"{p.row('eager').median_ms / floor:.2f}" if floor else ""]
    cells += [f"{compile_row.median_ms / floor:.2f}" if compile_row and floor else ""] if compiled else []
    return rows + [dict(dtype=p.dtype, name="floor", colour="floor", cells=[*cells, "", "", ""], best=False)]


def _memory_rows(p: ProfileResult) -> list[dict]:
    """One line for each side whose memory was measured."""
    return [dict(dtype=p.dtype, name=tables.NAMES[row.variant], colour=plots.SERIES[row.variant], cells=tables.memory_cells(row), limited=row.limit is not None,
                 holds=row.holds) for row in p.memory]


def kept(profiles: list[ProfileResult]) -> str:
    """What swaps left behind for good, in one sentence for all of them."""
    sizes = {f"{row.variant}, {p.dtype}": row.kept_mib for p in profiles for row in p.memory if row.limit is not None and row.kept_mib >= 0.01}
    if sizes:
        return "Rearranged weights and tables that are kept: " + "; ".join(f"{name}: {size:.2f} MiB" for name, size in sizes.items()) + "."
    return "No swap keeps rearranged weights."


def _what_runs(profile: ProfileResult) -> str:
    rounds = f"medians of {profile.settings['rounds']} rounds."
    if "steps" not in profile.settings:
        return f"One call of the denoiser, {rounds}"
    count, steps = len(profile.settings["seeds"]), profile.settings["steps"]
    return f"One whole run, text to {'picture' if count == 1 else f'{count} pictures'}, {steps} steps, {rounds}"


def shares(profiles: list[ProfileResult]) -> list[dict]:
    """Stages and kinds of each target as stacked bars."""
    found = []
    for target in dict.fromkeys(p.target for p in profiles):
        for name in ("stages", "kinds"):
            group = [p for p in profiles if p.target == target and getattr(p, name)]
            if not group:
                continue
            # eager, exact, close only: a compiled graph has stages, but no kinds to compare them with
            parts = [{v: spent for v, spent in getattr(p, name).items()} for p in group]
            entries = [e for e in next(iter(parts[0].values())) if any(spent[e] > 0 for part in parts for spent in part.values())]
            found.append(dict(title=f"{target}, by {'stage' if name == 'stages' else 'kind of operation'}",
                              legend=[dict(name=e, colour=plots.KIND_COLOURS[e]) for e in entries],
                              plots=[dict(title=p.dtype, svg=plots.stacked_bars(part, f"{name} of {target} in {p.dtype}")) for p, part in zip(group, parts)]))
    return found


def _cells(row, target: str) -> dict:
    return dict(target=target, level=row.level, name=row.name, numerics=row.numerics, backend=row.backend, shape=row.shape, rule=row.rule,
                max_error=tables.figure(row.max_error), stock_max_error=tables.figure(row.stock_max_error),
                mean_error=tables.figure(row.mean_error), stock_mean_error=tables.figure(row.stock_mean_error),
                mismatch=tables.percent(row.mismatch), psnr=tables.decibel(row.psnr), holds=row.holds, reason=row.reason)


def _swap_table(result: ParityResult) -> dict:
    rows = [dict(numerics=numerics, side=side, op=op, reason=reason, count=count, example=example)
            for numerics, report in result.swaps.items() for side, op, reason, count, example in tables.grouped(report)]
    return dict(title=f"{result.target}, {result.dtype}", rows=rows,
                count="; ".join(f"{numerics}: {len(report['swapped'])} swapped, {len(report['left'])} left" for numerics, report in result.swaps.items()))


def facts(machine: dict, parities: list[ParityResult]) -> list[tuple[str, str]]:
    """The state that stands beside every figure."""
    memory = f", {machine['memory_gib']} GiB" if machine["memory_gib"] else ""
    found = [("processor", f"{machine['processor']}, {machine['isa']}, {machine['cores']} cores{memory}; {machine['threads']} threads used"),
             ("fusewire", f"{machine['fusewire']}, CPU library " + (f"at {machine['fusewire_isa']}" if machine["fusewire_isa"] else "not built: reference only")),
             ("versions", ", ".join(f"{name} {version}" for name, version in machine["versions"].items()) + f", Python {machine['python']}"),
             ("system", machine["system"] + (f"; {', '.join(machine['gpu'])}" if machine["gpu"] else "; no GPU"))]
    return found + [(p.target + f", {p.dtype}", p.description) for p in parities]
