"""docs/how_it_works: the quoted lines are the code's, and both languages say the same."""

import re

import pytest
from conftest import PROJECT

from utils.errors import UserError

PATHS = [PROJECT / "docs" / name for name in ("how_it_works.md", "how_it_works.zh-CN.md")]
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


def test_both_languages_have_the_same_equations_code_and_figures():
    english, chinese = (path.read_text(encoding="utf-8") for path in PATHS)
    for pattern in (r"\$\$.*?\$\$", r"^```.*?^```", r"\(figures/\w+\.png\)", r"\(\.\./nets/\w+\.py\)"):
        assert re.findall(pattern, english, flags=re.M | re.S) == re.findall(pattern, chinese, flags=re.M | re.S)


def test_every_figure_is_made_and_shown():
    from docs import figures

    shown = set(re.findall(r"figures/(\w+)\.png", PATHS[0].read_text(encoding="utf-8")))
    there = {path.stem for path in (PROJECT / "docs" / "figures").glob("*.png")}
    assert shown == set(figures.FIGURES) == there - {"fine_tuning"}  # that is docs.fine_tuning's
    assert sum(path.stat().st_size for path in (PROJECT / "docs" / "figures").glob("*.png")) < 1_500_000


def test_figures_are_drawn(tmp_path, monkeypatch):
    """Those that take no network."""
    from docs import figures

    monkeypatch.setattr(figures, "FOLDER", tmp_path)
    figures.main(["--names", "schedules,posterior"])
    assert {path.name for path in tmp_path.iterdir()} == {"schedules.png", "posterior.png"}
    with pytest.raises(UserError, match="--names: unknown nothing; known: noising, "):
        figures.main(["--names", "nothing"])
