"""The words of the page, English and Chinese. {} is filled in with facts, which the page escapes."""

WORDS: dict[str, tuple[str, str]] = {
    # What the page is about.
    "title_prune": ("Pruning report", "剪枝报告"),
    "title_sweep": ("Sweep of pruning rates", "剪枝率扫描"),
    "title_eval": ("Evaluation report", "评估报告"),
    "title_train": ("Training report", "训练报告"),
    "made_by": ("Made by segprune {version}.", "由 segprune {version} 生成。"),
    "language": ("Language", "语言"),
    "theme": ("Light or dark", "浅色 / 深色"),
    "print": ("Print", "打印"),
    "sections": ("On this page", "本页内容"),
    # The summary.
    "summary": ("In short", "概要"),
    "card_size": ("parameters", "参数量"),
    "card_work": ("work per image (MACs)", "单张图像计算量（MACs）"),
    "card_time": ("time per image", "单张图像耗时"),
    "card_miou": ("mIoU, the mean quality over the classes", "mIoU（各类别平均质量）"),
    "faster": ("{times} × faster", "快 {times} 倍"),
    "slower": ("{times} × as slow", "耗时为 {times} 倍"),
    "points": ("{points} points", "{points} 个百分点"),
    "from_to": ("{before} → {after}", "{before} → {after}"),
    "suffers": (
        "The class that loses most is {name}: its IoU goes from {before} to {after}.",
        "损失最大的类别是 {name}：IoU 从 {before} 变为 {after}。",
    ),
    "worst_class": (
        "The class that is recognised worst is {name}: its IoU is {after}.",
        "识别最差的类别是 {name}：IoU 为 {after}。",
    ),
    "quality_kept": (
        "Quality has hardly changed: mIoU {before} before, {after} after.",
        "质量几乎没有变化：mIoU 之前 {before}，之后 {after}。",
    ),
    "quality_fell": (
        "Quality fell: mIoU {before} before, {after} after.",
        "质量下降：mIoU 之前 {before}，之后 {after}。",
    ),
    "quality_rose": (
        "Quality rose: mIoU {before} before, {after} after.",
        "质量上升：mIoU 之前 {before}，之后 {after}。",
    ),
    "none_suffers": (
        "No class lost more than {points} points of IoU.",
        "没有任何类别的 IoU 损失超过 {points} 个百分点。",
    ),
    "folding_saved": (
        "Of the work, {folded} went by folding the decode head, which leaves the output as it is; the rest by removing "
        "channels.",
        "其中 {folded} 的计算量由折叠解码头省去（输出不变），其余由移除通道省去。",
    ),
    "next_step": ("What to do next: {what}.", "下一步：{what}。"),
    "random": (
        "The weights are random: sizes and times are true, the quality means nothing.",
        "权重是随机的：大小和耗时真实有效，质量没有意义。",
    ),
    # Networks.
    "networks": ("The networks", "各个网络"),
    "network": ("network", "网络"),
    "dense": ("dense, as loaded", "原始网络"),
    "folded": ("decode head folded (same output)", "解码头折叠后（输出相同）"),
    "pruned": ("pruned", "剪枝后"),
    "finetuned": ("fine-tuned", "微调后"),
    "best": ("best epoch", "最佳轮次"),
    "parameters": ("parameters (M)", "参数量 (M)"),
    "macs": ("MACs (G)", "MACs (G)"),
    "latency_ms": ("time per image (ms)", "单张耗时 (ms)"),
    "miou": ("mIoU", "mIoU"),
    "difference": ("difference to dense", "与原始网络之差"),
    # Images.
    "images": ("Before and after, by eye", "前后对比"),
    "images_one": ("What the network sees", "网络看到了什么"),
    "rule_two": (
        "{tried} validation images at most, spread evenly, were tried. Half of those shown lost most correct pixels; the "
        "typical ones lie in the middle.",
        "从验证集中等间隔取最多 {tried} 张图像。所示图像中，一半是正确像素损失最多的，“典型”的位于中间。",
    ),
    "rule_one": (
        "{tried} validation images at most, spread evenly, were tried. The worst ones have fewest correct pixels; the "
        "typical ones lie in the middle.",
        "从验证集中等间隔取最多 {tried} 张图像。“最差”是正确像素最少的，“典型”位于中间。",
    ),
    "worst": ("worst", "最差"),
    "worst_two": ("lost most", "损失最大"),
    "typical": ("typical", "典型"),
    "right_two": (
        "{before} of the pixels right before, {after} after",
        "正确像素：之前 {before}，之后 {after}",
    ),
    "right_one": ("{after} of the pixels right", "正确像素 {after}"),
    "slider": ("Move to compare; arrow keys work too", "拖动以对比，也可用方向键"),
    "left": ("Left", "左侧"),
    "right": ("Right", "右侧"),
    "layer_before": ("dense", "原始网络"),
    "layer_after": ("after pruning", "剪枝后"),
    "layer_after_finetuned": ("pruned and fine-tuned", "剪枝并微调后"),
    "layer_after_one": ("prediction", "预测"),
    "layer_truth": ("ground truth", "真实标注"),
    "layer_changed": ("changed pixels", "变化的像素"),
    "layer_changed_one": ("wrong pixels", "错误的像素"),
    "layer_image": ("image alone", "仅图像"),
    "lost": ("right before, wrong now", "原先正确，现在错误"),
    "gained": ("wrong before, right now", "原先错误，现在正确"),
    "other": ("wrong before and now, differently", "前后均错误，但不同"),
    "wrong": ("wrong", "错误"),
    # Classes.
    "classes": ("Quality of each class", "各类别质量"),
    "classes_two": (
        "IoU: the share of a class's area that is found and right. The class that lost most stands first. Upper bar: "
        "before. Lower bar: after.",
        "IoU：类别区域中找到且正确的比例。损失最大的类别排在最前。上方条形：之前；下方条形：之后。",
    ),
    "classes_one": (
        "IoU: the share of a class's area that is found and right. The worst class stands first.",
        "IoU：类别区域中找到且正确的比例。最差的类别排在最前。",
    ),
    "class": ("class", "类别"),
    "before": ("before", "之前"),
    "after": ("after", "之后"),
    "change": ("change (points)", "变化（百分点）"),
    "absent": ("absent", "未出现"),
    # What was removed.
    "removed": ("What was removed", "移除了什么"),
    "removed_help": (
        "How many channels each block keeps, of how many it had; the filled part of a bar is what it keeps. Stage width: "
        "what all blocks of a stage read and write. Heads, queries and keys, values and reduction belong to the attention, "
        "FFN is the hidden layer after it. A blank: the block has no such part.",
        "每个模块保留的通道数 / 原有的通道数；条形的填充部分为保留的部分。阶段宽度：该阶段所有模块读写的通道；"
        "注意力头、查询与键、值、缩减属于注意力，FFN 是其后的隐藏层。空白：该模块没有这一部分。",
    ),
    "block": ("stage.block", "阶段.模块"),
    "kind_stage": ("stage width", "阶段宽度"),
    "kind_heads": ("attention heads", "注意力头"),
    "kind_qk": ("queries and keys", "查询与键"),
    "kind_v": ("values", "值"),
    "kind_reduction": ("reduction", "缩减"),
    "kind_ffn": ("FFN", "FFN"),
    "decode_head": ("decode head", "解码头"),
    "branch_removed": ("removed", "已移除"),
    # Parts.
    "parts": ("Where the cost is", "开销在哪里"),
    "parts_help": (
        "Upper bar: dense. Lower bar: pruned.",
        "上方条形：原始网络；下方条形：剪枝后。",
    ),
    "part": ("part", "部分"),
    "stage": ("stage {number}", "阶段 {number}"),
    "part_parameters": ("parameters (k)", "参数量 (k)"),
    "part_macs": ("MACs (M)", "MACs (M)"),
    "part_ms": ("time (ms)", "耗时 (ms)"),
    # Curves.
    "trade_off": ("Quality against cost", "质量与开销"),
    "trade_off_help": (
        "Every network that was measured: further left is cheaper, higher is better.",
        "所有测量过的网络：越靠左开销越小，越高质量越好。",
    ),
    "axis_parameters": ("parameters (M)", "参数量 (M)"),
    "axis_macs": ("MACs for one image (G)", "单张图像 MACs (G)"),
    "axis_latency_ms": ("time per image (ms)", "单张图像耗时 (ms)"),
    "search": ("trials of the search", "搜索中的试验"),
    "on_part": ("on a part of the images", "部分图像"),
    "all_points": ("All points", "所有数据点"),
    "rate": ("network or rate", "网络或剪枝率"),
    "curve": ("curve", "曲线"),
    "knee": ("Where the curve bends", "曲线的拐点"),
    "knee_parameters": (
        "Up to here {saved} of the parameters are saved for {lost} points of mIoU; the next step, to rate {rate}, costs "
        "{next_lost}.",
        "到此为止，以 {lost} 个百分点的 mIoU 节省了 {saved} 的参数；下一步（剪枝率 {rate}）再损失 {next_lost} 个百分点。",
    ),
    "knee_macs": (
        "Up to here {saved} of the MACs are saved for {lost} points of mIoU; the next step, to rate {rate}, costs "
        "{next_lost}.",
        "到此为止，以 {lost} 个百分点的 mIoU 节省了 {saved} 的 MACs；下一步（剪枝率 {rate}）再损失 {next_lost} 个百分点。",
    ),
    "knee_latency_ms": (
        "Up to here {saved} of the time is saved for {lost} points of mIoU; the next step, to rate {rate}, costs "
        "{next_lost}.",
        "到此为止，以 {lost} 个百分点的 mIoU 节省了 {saved} 的耗时；下一步（剪枝率 {rate}）再损失 {next_lost} 个百分点。",
    ),
    "knee_other": ("{reason}", "{reason}"),
    "training": ("Training", "训练"),
    "loss": ("loss", "损失"),
    "epoch": ("epoch", "轮次"),
    "miou_val": ("mIoU on validation images", "验证集 mIoU"),
    # How it was measured.
    "measured": ("How every number was measured", "各项数字如何测得"),
    "how_counts": (
        "Parameters and MACs (multiply-adds for one image) follow from the widths by formula.",
        "参数量与 MACs（单张图像的乘加次数）由各层宽度按公式计算。",
    ),
    "how_timed": (
        "Times are medians of {runs} runs, the networks in turns after a warm-up: batch {batch}, {size} pixels, "
        "{precision}, device {device}, threads {threads}.",
        "耗时为预热后各网络轮流运行 {runs} 次的中位数：批大小 {batch}，{size} 像素，{precision}，设备 {device}，"
        "线程数 {threads}。",
    ),
    "how_scored": (
        "IoU compares labels with predictions in each image's own pixels, all images of “{split}” together; mIoU is the "
        "mean over the classes.",
        "IoU 在每张图像的原始像素上比较标注与预测，合计 “{split}” 的所有图像；mIoU 为各类别的平均。",
    ),
    "how_repaired": (
        "After cutting, layers were solved again by least squares from {images} images, without any training.",
        "剪枝后用 {images} 张图像以最小二乘重新求解各层，未经任何训练。",
    ),
    # What comes next.
    "commands": ("What to type next, in a terminal", "接下来在终端中输入"),
    "copy": ("Copy", "复制"),
    "copied": ("Copied", "已复制"),
    "do_finetune": (
        "fine-tune the pruned network, which wins back quality",
        "微调剪枝后的网络，恢复质量",
    ),
    "do_export": ("export it for other runtimes", "导出到其他运行时"),
    "do_benchmark": ("measure both side by side", "并排测速"),
    "do_predict": (
        "try it on your own images (put your folder in place of IMAGES)",
        "在自己的图像上试用（将 IMAGES 换成您的文件夹）",
    ),
    "do_prune": ("prune the network", "对网络剪枝"),
    # Settings.
    "settings": ("Settings and versions", "设置与版本"),
    "table_settings": ("settings", "设置"),
    "table_pruning_config": ("what was asked of the pruning", "剪枝要求"),
    "table_environment": ("versions", "版本"),
    # What is missing.
    "missing": ("Not on this page", "本页缺少的内容"),
    "missing_finetuned": (
        "Fine-tuning of {epochs} epochs was to follow and has not come to its end.",
        "原定 {epochs} 轮微调，尚未完成。",
    ),
    "missing_scores": (
        "No quality per class: these results hold no scores; give --data when you prune.",
        "没有各类别质量：结果中没有评分；剪枝时请给出 --data。",
    ),
    "missing_specs": (
        "No widths: these results are of an older version, and the checkpoints are not where they were.",
        "没有宽度信息：结果来自旧版本，且检查点已不在原处。",
    ),
    "missing_parts_ms": (
        "No times for the parts: they were not measured.",
        "没有各部分耗时：未测量。",
    ),
    "missing_rows": ("No point has been measured yet.", "尚未测量任何数据点。"),
    "missing_epochs": (
        "{done} of {epochs} epochs were trained; the run can be resumed.",
        "已训练 {done} / {epochs} 轮，可继续训练。",
    ),
    "no_data": (
        "No images: these results were made without a data set.",
        "没有图像：结果生成时未使用数据集。",
    ),
    "no_network": (
        "No images: {path} is not where it was.",
        "没有图像：{path} 已不在原处。",
    ),
    "no_images": (
        "No images of {data}: {reason} If the data set was moved, run: segprune report DIR --data ITS_NEW_PLACE",
        "没有 {data} 的图像：{reason} 若数据集已移动，请运行：segprune report DIR --data 新位置",
    ),
}
