"""Documents, helps and messages use the field's words: image, sample, checkpoint, resume, ..."""

import ast
import re

import pytest
from conftest import PROJECT
from documents import ALL, RESULTS, Page, files

import docs.settings
from utils.settings import source_comments

INSTEAD = {  # what not to write: what to write
    r"draw(s|n|ing)?": "sample, generate",
    r"pictures?": "image",
    r"in the box": "the bundled checkpoint",
    r"the block": "the defaults (`Config`) at the top of the script",
    r"goes over": "overrides",
    r"typed": "on the command line",
    r"by heart": "memorized",
    r"a share of": "fraction of, probability",
    r"go(es|ing)? on (with|where|as|at)": "resumes, continues",
    r"anew": "again, re-",
    r"beside": "next to, compared with",
    r"the list|a list of one's own": "annotation file",
    r"rooms?|floor plan": "package, layer",
    r"page of (a|the) run": "HTML report",
    r"faint noise": "low noise levels",
    r"grounds?": "background",
    r"contestants?": "baseline",
    r"(?<!which )(?<!that )the card": "the model card",
    r"normalis\w+|colou?red|colours?|grey|licences?|memoris\w+|neighbours?|optimis\w+": "American spelling",
}
ENGLISH = {**INSTEAD, "Frechet": "Fréchet"}  # of documents; where programs print, a terminal may have no accents
CHINESE = {
    "(?<![动图])画(?!面|质|布)": "生成，采样",
    "回答": "输出，预测",
    "噪声表(?!示)": "噪声调度",
    "批大小|批次": "batch size，batch",
    "笔记本": "Notebook",
    "百万|十亿": "万，亿",
    "不会丢": "断点续训",
    "按名字拒绝": "报错并指出",
    "抄袭|背下": "记住，复制训练图片",
    "参考实现": "原仓库",
    "[一两]个核": "单核 CPU，2 核 CPU",
}
# At most five places may stay, each with its reason: {(file, word): reason}.
EXCEPTIONS = {
    ("utils/checkpoint/file.py", "pictures"): "a key of the file format, which older checkpoints have",
    ("docs/settings.md", "Frechet"): "a help text: a terminal may have no accents",
}


def places(text, words):
    """[(line, word, what to write)] of what is not to be written."""
    for word, instead in words.items():
        pattern = word if words is CHINESE else rf"\b({word})\b"
        for match in re.finditer(pattern, text):
            yield text.count("\n", 0, match.start()) + 1, match[0], instead


def texts_of_code(path):
    """[(line, text)] of the strings of a module that are no docstrings: messages, among others."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value


def texts():
    """(file, line, text, words) of all documents, strings of the code, and help texts."""
    for path in ALL:
        page = Page(path)
        yield page.name, 1, page.plain, CHINESE if path.name.endswith("zh-CN.md") else ENGLISH
    yield from ((page.name, 1, page.plain, INSTEAD) for page in map(Page, RESULTS))
    for name in sorted(files()):
        if name.endswith(".py") and not name.startswith(("tests/", "docs/")):
            yield from ((name, line, text, INSTEAD) for line, text in texts_of_code(PROJECT / name))
    for command, config_class, _ in docs.settings.scripts():
        for part in source_comments(config_class):
            yield from ((f"{command} --help", 1, text, INSTEAD) for text in part.values())


def test_documents_helps_and_messages_use_the_words_of_the_field():
    faults = [
        f"{name}:{first + line - 1}: {word}: write {instead}"
        for name, first, text, words in texts()
        for line, word, instead in places(text, words)
        if (name, word) not in EXCEPTIONS
    ]
    assert faults == [] and len(EXCEPTIONS) <= 5


@pytest.mark.parametrize(
    ("text", "words", "word"),
    [
        ("It draws pictures", INSTEAD, "draws"),
        ("两个核上", CHINESE, "两个核"),
        ("drawback, typed_options", INSTEAD, None),
    ],
)
def test_a_word_is_seen_with_what_to_write_instead(text, words, word):
    assert [found for _, found, _ in places(text, words)][:1] == ([word] if word else [])
