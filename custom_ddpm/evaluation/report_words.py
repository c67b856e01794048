"""Words of the report in Chinese that are not in its templates, and reasons why a part is missing in both languages."""

import re

# Reason of `report.Missing` -> English, Chinese; {} is the error.
REASONS = {
    "no_held_out": (
        "There are no held-out pictures: train with --validation_split, or give --validation_split to the report.",
        "没有留出图片：训练时加 --validation_split，或在生成报告时给出 --validation_split。",
    ),
    "stream": (
        "The run was trained on a stream (--streaming), which is not compared with.",
        "训练数据是流（--streaming），无法与之比较。",
    ),
    "no_data": (
        "The pictures of the run cannot be opened: {}. --against gives their new place.",
        "无法打开训练所用的图片：{}。可用 --against 给出新的位置。",
    ),
    "failed": ("It could not be measured: {}.", "无法测量：{}。"),
    "no_curve": (
        "The run wrote no loss curve.",
        "训练没有写出损失曲线。",
    ),
    "no_bounds": (
        "The loss is drawn without its two bounds: {}.",
        "损失图中没有上下界：{}。",
    ),
    "no_grid": ("The run wrote no sample grid.", "训练没有写出样本图。"),
}

# Of `symptoms.SYMPTOMS`; one that is not here is shown in English.
FINDINGS = {
    "learning rate too high": "学习率过高",
    "warm-up too long": "预热过长",
    "loss has not begun to fall": "损失还没有开始下降",
    "overfitting": "过拟合",
    "remembers the training set": "背下训练集",
    "too few steps": "训练步数太少",
    "loss has stopped falling": "损失不再下降",
    "worse than linear": "不如线性去噪器",
    "labels not used": "没有用到类别标签",
    "average too long": "平均过长",
    "range or mode of the training pictures": "训练图片的范围或模式",
    "x_T shows the picture": "x_T 仍可见原图",
    "sampling starts too late": "采样起点太晚",
    "too few sampling steps": "采样步数太少",
    "drawn pictures look wrong": "生成的图片不对",
    "drawn pictures are noisy": "生成的图片有噪声",
}

KINDS = {"gray": "灰度", "RGB": "RGB ", "RGBA": "RGBA "}

NOTES = (
    (r"^seeds (\d+) to (\d+), ", r"种子 \1 到 \2，"),
    (r"biased upwards at N = ([\d,]+)", r"N = \1 时偏高"),
    (r"extrapolated to infinitely many pictures", "外推到无穷多张图片"),
    (r", roughly: from N = ([\d,]+) <= D = ([\d,]+)", r"，粗略：N = \1 <= D = \2"),
    (r"unbiased; 0 for equal distributions", "无偏；分布相同时为 0"),
    (r"([\d,]+) against ([\d,]+) pictures", r"\1 张对 \2 张图片"),
    (r"^refused: ", "拒绝计算："),
    (r"^([\d,]+) training pictures$", r"\1 张训练图片"),
    (r"^([\d,]+) held-out pictures, split ", r"\1 张留出图片，划分 "),
)

METRICS = (
    (r"^precision", "精确率"),
    (r"^recall", "召回率"),
    (r"^density", "密度"),
    (r"^coverage", "覆盖率"),
    (r"random convolutions", "随机卷积"),
    (r" classifier\b", " 分类器"),
    (r"^pixels$", "像素"),
)


def translated(text: str, rules: tuple[tuple[str, str], ...]) -> str:
    """A text of `evaluate` in Chinese, as far as the rules go."""
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text
