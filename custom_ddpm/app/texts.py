"""All texts of the page, in English and in Chinese; the tabs on the mathematics have their own."""

LANGUAGES = ("en", "zh")

# key -> English, Chinese; {} are values.
TEXTS: dict[str, tuple[str, str]] = {
    # the page
    "title": ("Denoising diffusion", "去噪扩散模型"),
    "model": ("Model: {name}, pictures of {size} pixels.", "模型：{name}，图片大小 {size} 像素。"),
    "other_language": ("中文", "English"),
    "generate": ("Generate", "生成"),
    "edit": ("Edit", "编辑"),
    "forward": ("Forward", "前向"),
    "bayes": ("Bayes", "贝叶斯"),
    "train": ("Train", "训练"),
    "no_model": (
        "This page was started without a model. Train one, in about two minutes, with `{train}`, or on the tab "
        "*Train*; then start the page again: `custom-ddpm app ddpm-digits`.",
        "启动本页面时没有给出模型。用 `{train}` 或在“训练”页训练一个（约两分钟），"
        "然后重新启动页面：`custom-ddpm app ddpm-digits`。",
    ),
    # settings of a request
    "class": ("Class", "类别"),
    "all_classes": ("all in turn", "各类轮流"),
    "no_class": ("no class", "不指定类别"),
    "guidance": ("Guidance scale", "引导强度"),
    "guidance_info": ("1 is no guidance; more makes the class plainer.", "1 表示不引导；越大，类别特征越明显。"),
    "sampler": ("Sampler", "采样器"),
    "steps": ("Steps", "步数"),
    "seed": ("Seed of the first picture", "第一张图片的种子"),
    "seed_info": ("The next picture has the next number.", "下一张图片的种子依次加一。"),
    "number": ("Number of pictures", "图片数量"),
    "picture": ("Picture", "图片"),
    "first_picture": ("First picture", "第一张图片"),
    "second_picture": ("Second picture", "第二张图片"),
    "strength": ("Strength", "强度"),
    "strength_info": (
        "Share of the steps that are done: near 0 the picture stays as it is, 1 is a new one.",
        "执行的步数比例：接近 0 时图片不变，1 为全新图片。",
    ),
    "draw": ("Draw", "生成图片"),
    "cancel": ("Cancel", "取消"),
    # what is shown
    "waiting": ("The pictures appear here, from noise to the result.", "图片将显示在这里，从噪声到结果。"),
    "queued": ("Waiting for its turn …", "正在排队……"),
    "starting": ("Starting …", "正在开始……"),
    "step": ("step {done} of {total}", "第 {done} 步，共 {total} 步"),
    "state": ("x_t, t = {t}", "x_t，t = {t}"),
    "predicted": ("x̂_0, predicted from it", "由它预测的 x̂_0"),
    "finished": ("Finished after {seconds} s.", "完成，用时 {seconds} 秒。"),
    "cancelled": ("Cancelled.", "已取消。"),
    "result": ("Result", "结果"),
    "download": ("Download as PNG", "下载 PNG"),
    "lines": ("Python lines that make exactly this picture", "生成完全相同图片的 Python 代码"),
    "refused": ("Not possible", "无法执行"),
    # limits
    "too_many_steps": (
        "{value} steps are more than {most}; choose fewer.",
        "步数 {value} 超过上限 {most}，请减少。",
    ),
    "too_many_pictures": (
        "{value} pictures of this size are more than {most}; choose fewer.",
        "这种大小的图片数量 {value} 超过上限 {most}，请减少。",
    ),
    "bad_seed": (
        "Seed {value} is not possible; it must be an integer from 0 to {most}.",
        "种子 {value} 无效，必须是 0 到 {most} 的整数。",
    ),
    "bad_value": (
        "{name}: {value} is not possible; it must be from {least} to {most}.",
        "{name}：{value} 无效，必须在 {least} 到 {most} 之间。",
    ),
    "too_long": (
        "Stopped after {seconds} s, the limit for one request; choose fewer steps or pictures.",
        "已在 {seconds} 秒（单次请求的上限）后停止，请减少步数或图片数量。",
    ),
    "no_picture": ("There is no picture yet; upload one.", "还没有图片，请先上传。"),
    "not_a_picture": (
        "{name} is not a picture of a known format (PNG, JPEG, WebP, GIF, BMP, TIFF).",
        "{name} 不是可识别格式的图片（PNG、JPEG、WebP、GIF、BMP、TIFF）。",
    ),
    "file_too_large": (
        "{name} has {value} MB; at most {most} MB are taken.",
        "{name} 大小为 {value} MB，上限为 {most} MB。",
    ),
    "too_many_pixels": (
        "{name} has {width}x{height} pixels; at most {most} million are taken.",
        "{name} 有 {width}x{height} 像素，上限为 {most} 百万像素。",
    ),
    # Edit
    "variations": ("Variations", "变体"),
    "inpaint": ("Inpaint", "修补"),
    "between": ("Interpolate", "两图插值"),
    "inpaint_info": (
        "Upload a picture, paint with the brush over what is to be drawn anew; all other pixels stay as they are.",
        "上传图片，用画笔涂抹要重新生成的部分；其他像素保持不变。",
    ),
    "repeats": ("Repetitions of each step", "每步重复次数"),
    "repeats_info": (
        "More make what is drawn agree better with what is kept; the time is steps × repetitions.",
        "次数越多，新内容与保留部分越一致；耗时为步数 × 次数。",
    ),
    "no_mask": (
        "Nothing is painted; paint with the brush over what is to be drawn anew.",
        "还没有涂抹，请用画笔涂抹。",
    ),
    # Train
    "runs": ("Run", "训练"),
    "runs_info": ("Folders with a run under {folder}.", "{folder} 下的训练文件夹。"),
    "no_runs": ("There is no run in the folder of --runs yet.", "--runs 文件夹中还没有训练。"),
    "refresh": ("Refresh", "刷新"),
    "losses": ("Loss by noise level, between its bounds", "各噪声水平的损失及其上下界"),
    "newest_grid": ("Newest samples", "最新样本"),
    "diagnosis": ("Diagnosis", "诊断"),
    "nothing_found": ("Nothing found.", "没有发现问题。"),
    "no_diagnosis": ("Not yet: {reason}", "暂无：{reason}"),
    "progress": ("Step {step} of {total}, loss {loss}.", "第 {step} 步，共 {total} 步，损失 {loss}。"),
    "not_begun": ("No step is logged yet.", "尚未记录任何一步。"),
    "start": ("Train the default model (about 2 minutes)", "训练默认模型（约两分钟）"),
    "stop": ("Stop the training", "停止训练"),
    "start_only_here": (
        "A training can be started from this page only if it is served to this computer alone (--host 127.0.0.1).",
        "只有当页面仅供本机使用（--host 127.0.0.1）时，才能从这里启动训练。",
    ),
    "start_needs_clone": (
        "A training can be started from this page only in a clone of the repository, which has the digits.",
        "只有在仓库的克隆中（含数字图片），才能从这里启动训练。",
    ),
    "training_started": ("Training into {folder}.", "正在训练，输出到 {folder}。"),
    "training_runs": ("A training is running, in {folder}; stop it first.", "{folder} 中的训练正在进行，请先停止。"),
    "training_stopped": ("Stopping; a checkpoint is saved.", "正在停止，并保存检查点。"),
    "no_training": ("No training is running.", "没有正在进行的训练。"),
    "training_ended": (
        "The training in {folder} ended with status {status}: {line}",
        "{folder} 中的训练已结束，状态 {status}：{line}",
    ),
}


def say(language: str, key: str, **values: object) -> str:
    """A text of the page in a language of `LANGUAGES`, with its values."""
    return TEXTS[key][LANGUAGES.index(language)].format(**values)
