"""Writes docs/settings.md and docs/settings.zh-CN.md, the tables of all settings of all scripts.

python -m docs.settings

Names, defaults and help texts come from each script's `Config`, the values from its declarations,
the Chinese from docs/settings_zh.txt.
"""

import importlib
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from dataclasses import fields
from pathlib import Path

from utils.errors import run_script
from utils.files import atomic_write
from utils.settings import LARGEST, Setting, choice, source_comments
from utils.training.presets import PRESETS
from utils.training.settings_schema import RUN_SETTINGS

SCRIPTS = {  # command: module
    "python txt_annotation.py": "txt_annotation",
    "python train.py": "train",
    "python predict.py": "predict",
    "python -m utils.evaluate": "utils.evaluate.__main__",
}
HEAD = """# All settings

[中文](settings.zh-CN.md)

Each setting is an option of its script's command line, written as in Python: `--batch_size 32`,
`--input_shape 64,64`, `--attention_resolutions 1,` (in PowerShell, values with a comma need quotes:
`--input_shape "64,64"`). Defaults are defined in `Config` at the top of each
script. Precedence: command line > preset (`--preset`) > `Config`. Settings marked with \\* cannot be
changed when a run is resumed (`--resume`), and those marked with \\*\\* cannot be changed when a new run
starts from existing weights (`--start_from`) either. `python -m docs.settings` generates this page.
"""
HEAD_ZH = """# 全部参数

[English](settings.md)

每个参数都可以在命令行中指定，写法与 Python 相同：
`--batch_size 32`、`--input_shape 64,64`、`--attention_resolutions 1,`。
PowerShell 中，带逗号的值要加引号：`--input_shape "64,64"`。
默认值在各脚本开头的 `Config` 中。优先级：命令行 > 预设（`--preset`）> `Config`。
带 \\* 的参数在断点续训（`--resume`）时不能修改；
带 \\*\\* 的参数在用已有权重开始新的训练（`--start_from`）时也不能修改。
本页由 `python -m docs.settings` 生成。
"""
FOLDER = Path(__file__).resolve().parent
MARKS = {"": "", "run": r" \*", "weights": r" \*\*"}  # of Setting.fixed


def page(chinese: bool) -> str:
    """The whole page in one language."""
    translate = read_chinese().get if chinese else lambda text, default: text
    columns = "参数 | 默认值 | 取值 | 说明" if chinese else "setting | default | values | meaning"
    lines = [HEAD_ZH if chinese else HEAD]
    for command, config_class, declared in scripts():
        headings, helps = source_comments(config_class)
        lines += [f"## `{command}`", "", f"| {columns} |", "|---|---|---|---|"]
        for field in fields(config_class):
            if heading := headings.get(field.name):
                lines.append(f"| **{translate(heading, heading)}** | | | |")
            setting, about = declared[field.name], helps[field.name]
            values = values_in_chinese(setting) if chinese else str(setting)
            name = f"`{field.name}`{MARKS[setting.fixed]}"
            lines.append(f"| {name} | {code(field.default)} | {values} | {translate(about, about)} |")
        lines.append("")
    return "\n".join(lines)


def scripts():
    """(command, Config, declarations) of each script."""
    for command, name in SCRIPTS.items():
        module = importlib.import_module(name)
        known = {"preset": choice(PRESETS, fixed="run")} if name == "train" else {}
        yield command, module.Config, getattr(module, "SETTINGS", RUN_SETTINGS) | known


def read_chinese() -> dict[str, str]:
    """{English: Chinese} of docs/settings_zh.txt, an indented line below each English one."""
    lines = (FOLDER / "settings_zh.txt").read_text(encoding="utf-8").splitlines()
    return {one: other.strip() for one, other in zip(lines, lines[1:]) if other.startswith(" ")}


def code(value) -> str:
    """A value as it is typed on the command line."""
    if isinstance(value, tuple):
        value = ",".join(map(str, value)) + "," * (len(value) == 1)
    return f"`{value}`" if value != "" else '`""`'


def values_in_chinese(setting: Setting) -> str:
    """`str(setting)` in Chinese."""
    choices = "、".join(map(repr, setting.choices))
    if setting.kind is None:
        return choices
    noun = {int: "整数", float: "浮点数", bool: "True 或 False", str: "字符串"}[setting.kind]
    several = setting.count and len(setting.count) > 1
    if setting.count:
        noun = f"若干个{noun}" if several else f"{setting.count[0]} 个{noun}"
    if setting.lowest > -LARGEST:
        noun += f"（{setting.lowest} 到 {setting.highest}）" if setting.highest < LARGEST else f"（≥ {setting.lowest}）"
    if setting.count:
        noun += "，用逗号隔开" + "，只有一个时写成 1," * several
    return f"{noun}，或 {choices}" if choices else noun


def faults_of_chinese() -> list[str]:
    """What docs/settings_zh.txt lacks, and what it has to no purpose."""
    texts = [
        text for _, config_class, _ in scripts() for part in source_comments(config_class) for text in part.values()
    ]
    lacking = [f"no Chinese for: {text}" for text in dict.fromkeys(texts) if text not in read_chinese()]
    return lacking + [f"no setting has this text: {text}" for text in read_chinese() if text not in texts]


def main(arguments=None):
    form = {"description": __doc__, "formatter_class": RawDescriptionHelpFormatter}
    ArgumentParser("python -m docs.settings", **form).parse_args(arguments)
    for name, chinese in (("settings.md", False), ("settings.zh-CN.md", True)):
        with atomic_write(FOLDER / name, "w", encoding="utf-8") as file:
            file.write(page(chinese))
    for fault in faults_of_chinese():
        print(f"docs/settings_zh.txt: {fault}")


if __name__ == "__main__":
    run_script(main)
