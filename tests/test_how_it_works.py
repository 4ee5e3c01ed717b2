"""docs/how_it_works: the quoted lines are the code's, and both languages say the same.

Also the formulas and the figures of all documents.
"""

import re
from collections import Counter

import pytest
from conftest import PROJECT
from markdown_it import MarkdownIt
from PIL import Image

from utils.errors import UserError

PATHS = [PROJECT / "docs" / name for name in ("how_it_works.md", "how_it_works.zh-CN.md")]
# The article's own headings, as they stand there.
SECTIONS = (
    "一、什么是Diffusion",
    "1、加噪过程",
    "2、去噪过程",
    "二、DDPM网络的构建(Unet网络的构建)",
    "三、Diffusion的训练思路",
    "利用DDPM生成图片",
)
IMAGES = [
    path
    for folder in ("docs", "docs/figures", "benchmarks/results")
    for path in (PROJECT / folder).iterdir()
    if path.suffix in (".png", ".gif", ".svg")
]
SECTION_NUMBERS = ["1.", "1.1", "1.2", "2.", "3.", "4.", "5."]
# Of the article: what its equations and listings are about. Each has its place in both languages.
ARTICLE = (
    r"x_t = \sqrt{\alpha_t}\,x_{t-1} + \sqrt{1-\alpha_t}\,z_1",
    r"\sqrt{\alpha_t\alpha_{t-1}}\,x_{t-2}",
    r"\sqrt{1-\alpha_t\alpha_{t-1}}\;z",
    r"\mathcal N(0, \sigma_1^2+\sigma_2^2)",
    r"x_t = \sqrt{\bar\alpha_t}\,x_0 + \sqrt{1-\bar\alpha_t}\,\epsilon",
    r"\bar\alpha_t = \prod",
    r"q(x_{t-1} \mid x_t, x_0) = \frac",
    r"q(x_{t-1} \mid x_0) = \mathcal N",
    r"q(x_t \mid x_{t-1}, x_0) = \mathcal N",
    r"q(x_t \mid x_0) = \mathcal N",
    r"\alpha_t x_{t-1}^2}{\beta_t}",
    r"\frac{\alpha_t}{\beta_t}+\frac1{1-\bar\alpha_{t-1}}",
    r"-\frac{(x-\mu)^2}{2\sigma^2} = ",
    r"x^2/\sigma^2 - 2\mu x/\sigma^2 + \mu^2/\sigma^2",
    r"\tilde\mu_t = \frac{\sqrt{\alpha_t}",
    r"x_0 = \frac{1}{\sqrt{\bar\alpha_t}}",
    r"\tilde\mu_t = \frac{1}{\sqrt{\alpha_t}}",
    r"\epsilon_\theta(x_t, t)\right) + \sigma_t z",
    "frequencies",
    "PositionalEmbedding",
    "self.time_mlp =",
    "nn.GroupNorm",
    "self.downsample =",
    "self.upsample =",
    "self.conv_2",
    "self.time_bias",
    "self.to_qkv",
    "scaled_dot_product",
    "self.downs.append",
    "self.ups.append",
    "self.out_conv",
    "skips.pop()",
    "def extract",
    "def perturb_x",
    "torch.randint",
    "`get_losses`",
    "losses =",
    "txt_annotation.py",
    "train_lines.txt",
    "train.py",
    "predict.py",
)


def snippets(path):
    """(file, quoted lines) of each code block; the last link to a file before it names the file."""
    name = None
    for match in re.finditer(
        r"^\[([\w/]+\.py)\]\(\.\./\1\)$|^```python\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.M | re.S
    ):
        name = match[1] or name
        if match[2]:
            yield name, match[2]


@pytest.mark.parametrize("path", PATHS, ids=["en", "zh"])
def test_quoted_lines_are_the_codes(path):
    found = list(snippets(path))
    assert len(found) > 12
    for name, quoted in found:
        assert quoted in (PROJECT / name).read_text(encoding="utf-8"), f"{name} no longer has:\n{quoted}"


@pytest.mark.parametrize("path", PATHS, ids=["en", "zh"])
def test_each_equation_and_listing_of_the_article_has_its_place(path):
    text = path.read_text(encoding="utf-8")
    assert [part for part in ARTICLE if part not in text] == []


@pytest.mark.parametrize("path", PATHS, ids=["en", "zh"])
def test_the_sections_stand_in_the_articles_order_and_name_its_sections(path):
    text = path.read_text(encoding="utf-8")
    headings = re.findall(r"^#{2,3} (\d.*)$", text, flags=re.M)
    rows = dict(re.findall(r"^\| (\d[^|]*) \| ([^|]*) \|$", text, flags=re.M))
    assert list(rows) == headings and [heading.split()[0] for heading in headings] == SECTION_NUMBERS
    assert all(theirs.startswith(section) for theirs, section in zip(rows.values(), SECTIONS))


def test_both_languages_have_the_same_equations_code_and_figures():
    english, chinese = (path.read_text(encoding="utf-8") for path in PATHS)
    for pattern in (r"^```.*?^```", r"\(figures/\w+\.png\)", r"\(\.\./nets/\w+\.py\)"):
        assert re.findall(pattern, english, flags=re.M | re.S) == re.findall(pattern, chinese, flags=re.M | re.S)
    assert set(formulas(english)) == set(formulas(chinese))


# Formulas. In this order, so that what is code is passed over. The last two go through Markdown.
INLINE = r"\$`([^`]+)`\$"
FORMULA = re.compile(rf"^```math\n(.*?)^```|^```.*?^```|{INLINE}|`[^`]*`|\$\$(.+?)\$\$|\$([^$`]+)\$", flags=re.M | re.S)
PAGES = sorted(
    {
        *PROJECT.glob("*.md"),
        *(
            path
            for top in ("docs", "logs", "benchmarks", "datasets", "results")
            for path in (PROJECT / top).rglob("*.md")
        ),
    }
)


def formulas(text):
    """Counts of (formula, whether it is in code marks), a line break being a space."""
    found = [match for match in FORMULA.finditer(text) if any(match.groups())]
    return Counter((" ".join("".join(filter(None, match.groups())).split()), "`" in match[0]) for match in found)


def as_rendered(text):
    """The text that Markdown hands on to the browser: no escapes are left but in code."""
    lines = []
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type == "fence":
            lines.append(f"```{token.info}\n{token.content}```")
        for part in token.children or ():
            lines.append(f"`{part.content}`" if part.type == "code_inline" else part.content or "\n")
        lines.append("" if token.children else "\n")
    return "".join(lines)


def faults_of_formulas(text):
    """What GitHub would not show as it is meant."""
    there = formulas(text)
    faults = [f"{formula}: Markdown changes it" for formula, _ in there - formulas(as_rendered(text))]
    faults += [f"${formula}$ goes through Markdown: $`...`$ or a math block" for formula, code in there if not code]
    faults += ["a $ that begins or ends no formula"] if "$" in FORMULA.sub("", text) else []
    touched = re.findall(rf"\w{INLINE}|{INLINE}\w", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    return faults + [f"{formula}: a space belongs between it and the word" for formula in touched]


@pytest.mark.parametrize("path", PAGES, ids=[path.relative_to(PROJECT).as_posix() for path in PAGES])
def test_no_formula_is_changed_by_markdown(path):
    assert faults_of_formulas(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", PATHS, ids=["en", "zh"])
def test_each_formula_that_goes_through_markdown_is_seen(path):
    text, count = path.read_text(encoding="utf-8"), 0
    for paragraph in re.split(r"\n{2,}", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)):
        for match in re.finditer(INLINE, paragraph):
            broken = f"{paragraph[: match.start()]}${match[1]}${paragraph[match.end() :]}"
            assert faults_of_formulas(broken) and not faults_of_formulas(paragraph), match[0]
            count += 1
    assert count >= 60


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("so $`a\\,b`$, and", "so $a\\,b$, and"),
        ("so $`\\{a\\}`$", "so $`\\{a\\}$"),
        ("so $`a_1`$", "so $a_1$"),
        ("```math\na\\\\b\n```", "$$a\\\\b$$"),
        ("也就是 $`a`$ 的", "也就是$`a`$ 的"),
        ("（$`a`$）", "（$`a`$是）"),
        ("`$A` and `$B`", "$A and $B"),
    ],
)
def test_a_fault_of_a_formula_is_seen(right, wrong):
    assert faults_of_formulas(right) == [] and faults_of_formulas(wrong)


def test_every_figure_is_made_and_shown():
    from docs import figures

    shown = set(re.findall(r"figures/(\w+)\.png", PATHS[0].read_text(encoding="utf-8")))
    there = {path.stem for path in (PROJECT / "docs" / "figures").glob("*.png")}
    others = {"fine_tuning", *(f"conditioning_{name}" for name in ("gray", "masked", "low_res", "fashion"))}
    assert shown == set(figures.FIGURES) - {"forming"} == there - others
    assert sum(path.stat().st_size for path in (PROJECT / "docs" / "figures").glob("*.png")) < 1_500_000
    assert (PROJECT / "docs" / "emoji_forming.gif").stat().st_size <= 600_000  # README's, which forming makes


def test_every_figure_is_in_a_document():
    shown = {
        (path.parent / target).resolve()
        for path in PAGES
        for target in re.findall(r"\]\(([^)#\s]+)\)", path.read_text(encoding="utf-8"))
    }
    assert len(IMAGES) > 20 and {path.name for path in IMAGES if path not in shown} == set()


def test_no_figure_is_transparent():
    """Black text on GitHub's dark background cannot be read."""
    for path in IMAGES:
        if path.suffix == ".png":
            with Image.open(path) as image:
                assert image.convert("RGBA").getextrema()[3] == (255, 255), path
        elif path.suffix == ".svg":
            assert "fill: #ffffff" in path.read_text(encoding="utf-8")[:2000]


def test_figures_are_drawn(tmp_path, monkeypatch):
    """Those that take no network."""
    from docs import figures

    monkeypatch.setattr(figures, "FOLDER", tmp_path)
    figures.main(["--names", "schedules,posterior,unet"])
    assert {path.name for path in tmp_path.iterdir()} == {"schedules.png", "posterior.png", "unet.png"}
    with pytest.raises(UserError, match="--names: unknown nothing; known: chain, noising, "):
        figures.main(["--names", "nothing"])
