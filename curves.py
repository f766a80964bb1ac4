"""The curves of training runs, from the metrics.jsonl that train.py writes: curves.png of one run, or of several in one picture."""
import importlib.util
import json
import os

from data import BadInput, read_text, stream_rows

# The upper row has the training batches too. What a batch adds to the lower row is which pairs it drew, not what was learned.
# The last panel is how far the student has moved: log pi - log ref, the mean of both answers.
PANELS = (("loss", "loss, nats"), ("rewards/accuracies", "chosen ranked above rejected, share"), ("rewards/margins", "margin m, nats"),
          ("logps/chosen", "log-probability of chosen, nats"), ("logps/rejected", "log-probability of rejected, nats"),
          ("log-ratio", "mean log-ratio to the reference, nats"))


def draw_curves(folders, path):
    """Draws the runs of train.py in some folders into one PNG, one colour per run: training as a thin line, held-out pairs as dots.

    BadInput where a folder holds no run, or matplotlib is missing.
    """
    if not have_matplotlib():
        raise BadInput("curves need matplotlib: pip install matplotlib")
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    figure, axes = plt.subplots(2, 3, figsize=(13, 7.5), layout="constrained")
    for number, folder in enumerate(folders):
        args, metrics = (os.path.join(folder, name) for name in ("args.json", "metrics.jsonl"))
        beta = json.loads(read_text(args, "the out_dir of a run of train.py"))["beta"]
        lines = [line for _, line in stream_rows(metrics, on_bad=lambda error: None)]  # a killed run may have left its last line torn
        training, held_out = ([line for line in lines if key in line] for key in ("loss", "eval/loss"))
        for line in held_out:
            line["eval/log-ratio"] = (line["eval/rewards/chosen"] + line["eval/rewards/rejected"]) / 2 / beta
        for axis, (name, title) in zip(axes.flat, PANELS):
            if axis in axes[0]:
                axis.plot([line["step"] for line in training], [line[name] for line in training], color=f"C{number}", linewidth=0.8, alpha=0.4)
            axis.plot([line["step"] for line in held_out], [line["eval/" + name] for line in held_out], "o-", color=f"C{number}", markersize=4)
            axis.set_title(title, fontsize=12)
            axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("optimizer step", fontsize=12)
    handles = [Line2D([], [], color="0.4", linewidth=0.8, label="training"), Line2D([], [], color="0.4", marker="o", label="held out")]
    handles += [Line2D([], [], color=f"C{number}", linewidth=4, label=folder) for number, folder in enumerate(folders)]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6), fontsize=12, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def have_matplotlib():
    return importlib.util.find_spec("matplotlib") is not None
