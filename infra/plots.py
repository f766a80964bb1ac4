"""curves.png, drawn from the metrics.jsonl that train.py writes: one run, or several in colours."""
import importlib.util
import os

from infra.command import BadInput
from infra.rows import read_flags, stream_rows

# The upper row also shows the training batches. In the lower row they would show which pairs a
# batch holds, not what was learned. The last panel is how far the student moved: the mean of
# log pi - log ref over both answers.
PANELS = (
    ("loss", "loss, nats"),
    ("rewards/accuracies", "chosen ranked above rejected, share"),
    ("rewards/margins", "margin m, nats"),
    ("logps/chosen", "log-probability of chosen, nats"),
    ("logps/rejected", "log-probability of rejected, nats"),
    ("log-ratio", "mean log-ratio to the reference, nats"),
)
NO_CURVES = "curves need matplotlib: pip install matplotlib"


def have_matplotlib():
    return importlib.util.find_spec("matplotlib") is not None


def draw_curves(folders, path):
    """Draw the runs in out_dirs of train.py into one PNG: thin lines training, dots validation.

    Returns a line that names it. BadInput if a folder holds no run, or matplotlib is missing.
    """
    if not have_matplotlib():
        raise BadInput(NO_CURVES)
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(2, 3, figsize=(13, 7.5), layout="constrained")
    for number, folder in enumerate(folders):
        training, validation = read_metrics(folder)
        for axis, (name, title) in zip(axes.flat, PANELS):
            if axis in axes[0]:
                axis.plot([line["step"] for line in training], [line[name] for line in training],
                          color=f"C{number}", linewidth=0.8, alpha=0.4)
            axis.plot([line["step"] for line in validation],
                      [line["eval/" + name] for line in validation], "o-", color=f"C{number}",
                      markersize=4, label=folder if name == "log-ratio" else None)
            axis.set_title(title, fontsize=12)
            axis.grid(alpha=0.3)
    figure.supxlabel("optimizer step; thin lines: training, dots: validation", fontsize=12)
    figure.legend(loc="outside upper center", ncols=min(len(folders), 4), fontsize=12,
                  frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return f"curves in {path}"


def read_metrics(folder):
    """(training lines, validation lines) of a run's metrics.jsonl, with eval/log-ratio added."""
    beta = read_flags(folder)["beta"]
    # A killed run may have left its last line torn.
    metrics = stream_rows(os.path.join(folder, "metrics.jsonl"), on_bad=lambda error: None)
    lines = [line for _, line in metrics]
    validation = [line for line in lines if "eval/loss" in line]
    for line in validation:
        rewards = line["eval/rewards/chosen"] + line["eval/rewards/rejected"]
        line["eval/log-ratio"] = rewards / 2 / beta
    return [line for line in lines if "loss" in line], validation
