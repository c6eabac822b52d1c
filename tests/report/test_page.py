"""The page: complete in one file, honest about what fails, and free of this machine's paths."""

import io
import json
import math
import re
import tempfile
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fusewire.parity.result import ParityResult, Pictures, Row
from fusewire.profile.result import MemoryRow, ProfileResult, Verdict
from fusewire.profile.result import Row as Side
from fusewire.report import images, page, plots, tables

MACHINE = dict(processor="A Processor", cores=2, threads=2, memory_gib=8.0, isa="AVX2", fusewire_isa="avx2", gpu=[], system="Linux x86_64",
               load=0.1, python="3.12.0", fusewire="0.1.0", versions={"torch": "2.13.0"})
SWAPS = {numerics: {"swapped": [dict(name="transformer_blocks.0", op="gate_residual", reason="")],
                    "left": [dict(name="transformer_blocks.0.attn", op="attention", reason="sums in <another> order")]} for numerics in ("exact", "close")}


def parity_result(holds=True, dtype="float32"):
    rows = [Row("op", "adaln_modulate", "exact", dtype, "cpu", "2x3", "exact", True, True, "", 1e-7, 1e-8, 1e-7, 1e-8, 0.0, 0.0, 0.0)]
    for numerics in ("exact", "close"):
        for seed in (0, 1):
            good = holds or numerics == "close"
            rows.append(Row("picture", f"seed {seed}, 2 steps", numerics, dtype, "", "4x2x2", "exact", good, good,
                            "" if good else "final latents <differ>", psnr=math.inf if numerics == "exact" else 66.6))
    stock = torch.rand(2, 3, 8, 8)
    pictures = Pictures(["a <red> 7", "a blue 3"], [0, 1], {"stock": stock, "exact": stock, "close": stock + 1e-3})
    curves = {"exact against stock": [0.0, 0.0], "close against stock": [1e-7, 2e-7], "stock against float64": [1e-7, 2e-7],
              "exact against float64": [1e-7, 2e-7], "close against float64": [1e-7, 1e-7]}
    return ParityResult("digits", "a pipeline", dtype, rows, SWAPS, MACHINE, dict(steps=2, guidance=4.0, seeds=[0, 1]), curves, pictures)


STAGES = {"text encoders": 11.0, "denoiser": 70.0, "scheduler": 2.0, "VAE": 13.0}


def pipeline_profile():
    """Of a whole pipeline: its stages were clocked, the compiled one's too."""
    result = profile_result()
    result.target, result.stages = "digits", {name: {stage: ms - 5 * (name == "close") * (stage == "denoiser") for stage, ms in STAGES.items()}
                                              for name in ("eager", "compile", "exact", "close")}
    return result


def profile_result(compiled=True, dtype="float32"):
    names = ["eager", *(["compile"] if compiled else []), "exact", "close"]
    rows = [Side(name, 100.0 - 10 * i, 90.0 - 10 * i, 110.0 - 10 * i, 1 + i / 10, 1.0 if compiled else None, 0.5, 200.0, 100.0, 12.0, {"cpu": 3})
            for i, name in enumerate(names)]
    kinds = {name: dict(attention=10.0, linears=40.0, convolutions=0.0, **{"norms and modulation": 20.0}, other=30.0) for name in names if name != "compile"}
    floor = dict(gflop=20.0, gib=0.1, gemm_gflops=400.0, bandwidth_gbs=30.0, arithmetic_ms=50.0, memory_ms=4.0, roofline_ms=51.0)
    return ProfileResult("sd3.5-medium", "3 blocks", dtype, rows, [Verdict("close: not slower", True, "")], floor, kinds, {}, SWAPS, MACHINE,
                         dict(rounds=3, compile=compiled), memory=[memory_row(name) for name in names])


def memory_row(name, kept=0.0, holds=True):
    limit = {"exact": 1.02, "close": 1.10}.get(name)
    return MemoryRow(name, 123.4 + kept, 100.0, 23.4 + kept, 21.4, 2.0, kept, 0.0, 1 + kept / 123.4, 1 + kept / 23.4, limit, holds)


class Links(HTMLParser):
    """Every address in a page, and whether each element that is opened is closed."""

    VOID = {"meta", "link", "img", "br", "input", "hr"}
    LOOSE = {"path", "use", "rect", "line", "stop", "image"}

    def __init__(self):
        super().__init__()
        self.addresses, self.open, self.tags = [], [], set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "xlink:href", "action", "data", "poster")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def written(tmp_path):
    path = page.write(tmp_path / "report", [parity_result(), parity_result(dtype="bfloat16")], [profile_result(), profile_result(dtype="bfloat16")],
                      command="fusewire demo", seconds=90.0)
    return path.read_text(encoding="utf-8"), json.loads((tmp_path / "report" / "report.json").read_text()), tmp_path


def test_nothing_is_fetched(written):
    text, _, _ = written
    links = Links()
    links.feed(text)
    assert links.open == [] and not {"script", "iframe", "object", "embed", "base", "form"} & links.tags
    assert links.addresses and all(address.startswith(("data:", "#")) for address in links.addresses)
    assert not re.search(r"url\((?!#)|@import|https?://(?!www\.w3\.org/)|//cdn", text)


def test_themes_and_narrow_screens(written):
    text, _, _ = written
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text and "max-width: 520px" in text
    for colour in plots.COLOURS.values():
        assert colour not in text  # every stand-in became a variable of the page
    for name in set(re.findall(r"var\(--([a-z0-9]+)\)", text)):
        assert len(re.findall(rf"--{name}:", text)) == 2, f"--{name} is not set for both themes"


def test_the_style_arrives_unescaped(written):
    text, _, _ = written
    style = text[text.index("<style>"):text.index("</style>")]
    assert ".tiles > div" in style and "&gt;" not in style and "&#34;" not in style


def test_no_path_of_this_machine(written):
    text, data, folder = written
    tops = [f"/{Path(path).resolve().parts[1]}/" for path in (__file__, Path.home() / "x", Path(tempfile.gettempdir()) / "x")]
    for leak in (str(folder), "/home/", *tops):
        assert leak not in text and leak not in json.dumps(data)


def test_text_is_escaped(written):
    text, _, _ = written
    assert "a &lt;red&gt; 7" in text and "<red>" not in text and "&lt;another&gt;" in text


def test_it_shows_what_there_is(written):
    text, _, _ = written
    assert text.count("<img ") == 2 * 2 * 5  # two dtypes, two seeds, three pictures and two maps
    assert text.count("<svg ") == 2 * 2 + 2 + 2  # curves, sides, kinds
    for word in ("fusewire demo", "A Processor", "torch 2.13.0", "66.6 dB", "floor", "stock, torch.compile", "1.5 minutes"):
        assert word in text, word
    assert "What does not hold" not in text


def test_bars_of_time_per_stage():
    text = page.render([parity_result()], [pipeline_profile()], command="fusewire demo", seconds=1.0)
    section = text[text.index("<h3>digits, by stage</h3>"):text.index("<h3>digits, by kind of operation</h3>")]
    assert 'aria-label="stages of digits in float32"' in section and section.count("<svg ") == 1
    legend = section[section.index('<ul class="legend">'):section.index("</ul>")]
    assert re.findall(r"</i>([^<]+)</li>", legend) == list(STAGES)
    bars = {stage: section.count(f"fill: var(--{plots.KIND_COLOURS[stage]})") for stage in STAGES}
    assert bars == dict.fromkeys(STAGES, 4)  # a piece of each of the four sides' bars
    assert len(re.findall(r">96</text>", section)) == 3 and len(re.findall(r">91</text>", section)) == 1  # their sums, ms
    assert "by stage" not in page.render([parity_result()], [profile_result()], command="fusewire demo", seconds=1.0)


def test_a_failure_is_shown_first():
    text = page.render([parity_result(holds=False)], [profile_result()], command="fusewire demo", seconds=1.0)
    assert "What does not hold" in text and "final latents &lt;differ&gt;" in text and "0 of 2" in text
    assert page.report_dict([parity_result(holds=False)], [profile_result()], command="x", seconds=1.0)["ok"] is False


def test_peak_memory(written):
    """A line for each side with its limit and verdict, and what the swap keeps, in words."""
    text, data, _ = written
    section = text[text.index("Peak memory, MiB"):text.index("<h2>Where the time goes</h2>")]
    assert "No swap keeps rearranged weights." in section
    assert section.count('<td class="n">123.4</td>') == 8 and section.count('<td class="good">holds</td>') == 4  # two dtypes; stock's have no limit
    assert section.count('<td class="n">1.02</td>') == 2 and section.count('<td class="n">1.10</td>') == 2
    row = data["profile"][0]["memory"][2]
    assert row["variant"] == "exact" and row["limit"] == 1.02 and row["holds"] is True and row["kept_mib"] == 0
    result = profile_result()
    result.memory[-1] = memory_row("close", kept=40.0, holds=False)
    text = page.render([parity_result()], [result], command="fusewire demo", seconds=1.0)
    assert "kept: close, float32: 40.00 MiB." in text and '<td class="bad">fails</td>' in text
    result.memory = []  # a device that does not tell
    assert "Peak memory, MiB" not in page.render([parity_result()], [result], command="fusewire demo", seconds=1.0)


def test_json_has_the_same_figures(written):
    _, data, _ = written
    assert data["ok"] is True and data["kind"] == "report" and [p["kind"] for p in data["parity"] + data["profile"]] == ["parity"] * 2 + ["profile"] * 2
    assert data["profile"][0]["rows"][0]["median_ms"] == 100.0 and data["parity"][0]["rows"][1]["psnr"] == "inf"


def test_without_pictures_and_compile():
    bare = parity_result()
    bare.pictures, bare.curves = None, {}
    text = page.render([bare], [profile_result(compiled=False)], command="fusewire demo", seconds=1.0)
    assert "<img " not in text and "torch.compile</td>" not in text


def test_pictures_without_a_number():
    result = parity_result()
    for variant in ("stock", "close"):
        result.pictures.variants[variant][0, 0, 0, 0] = math.nan
    result.rows[:] = [replace(row, psnr=math.nan, holds=False) if row.level == "picture" and row.numerics == "close" else row for row in result.rows]
    [tile] = [tile for tile in page.tiles([result], []) if "PSNR" in tile["small"]]
    assert tile["big"] == "NaN" and tile["tone"] == "bad"
    cards = page.gallery(result)["cards"]
    assert "NaN" in [view["caption"] for view in cards[0]["differences"]] and "nan" not in page.gallery(result)["scale"]


def test_labels_are_escaped_and_one_step_is_a_mark():
    curves = {"stock against float64": [1e-3], "close against float64": [2e-3]}
    drawn = plots.error_curves(curves, "float64")
    assert drawn.count("<use") >= 2  # the marks
    assert 'aria-label="milliseconds of a &lt;b&gt; &quot;c&quot; &amp; d"' in plots.side_bars({"eager": 1.0}, {"eager": 1.0}, {"eager": 1.0}, 0.5,
                                                                                           'milliseconds of a <b> "c" & d')


@pytest.mark.parametrize("width", (50, 80, 100, 200))
def test_tables_cut_no_number(width):
    """In a terminal that is too narrow columns are left out, and named."""
    result = parity_result()
    result.target = "a [red] folder"
    console = Console(width=width, file=io.StringIO())
    for part in tables.fitted(tables.parity_table(result), console):
        console.print(part)
    shown = console.file.getvalue()
    assert "…" not in shown and "[red]" in shown and all(len(line) <= width for line in shown.splitlines())
    assert shown.count("holds") == len(result.rows) and shown.count("1.00e-07") == 2  # the largest error, and stock's
    assert ("for which the terminal is too narrow" in " ".join(shown.split())) == (width <= 100)


def test_difference_maps():
    stock = torch.zeros(3, 4, 4)
    other = stock.clone()
    other[1, 2, 3] = 0.5
    found = images.difference(other, stock)
    assert found.shape == (4, 4) and found.max() == found[2, 3] == 0.5
    coloured = images.heat(found, 0.5)
    assert coloured.shape == (3, 4, 4) and coloured[:, 2, 3].sum() > coloured[:, 0, 0].sum()
    assert torch.equal(images.heat(torch.zeros(4, 4), 0.0), images.heat(torch.zeros(4, 4), 1.0))


def test_large_pictures_are_reduced():
    import base64
    import io

    from PIL import Image

    encoded = images.data_uri(torch.rand(3, 600, 400)).partition(",")[2]
    assert Image.open(io.BytesIO(base64.b64decode(encoded))).size == (171, 256)


def test_the_worst_row_stands_for_its_level():
    result = parity_result(holds=False)
    worst = {(row.level, row.numerics): row for row in tables.summary(result.rows)}
    assert worst["picture", "exact"].name.startswith("0 of 2 hold") and not worst["picture", "exact"].holds
    assert worst["picture", "close"].holds
