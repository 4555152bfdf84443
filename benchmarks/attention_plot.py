"""The plot of `bench_attention`: bandwidth by context."""

import importlib.util
import re
from collections import defaultdict

from benchmarks.publishing import RESULTS
from jaxkv.tune.implementation import HAS_GPU
from jaxkv.tune.timing import conditions


def plot(results: list[dict]) -> None:
    """Bandwidth by context of decode with even lengths, one line each."""
    if not importlib.util.find_spec("matplotlib"):
        print("no plot: matplotlib is not installed")
        return
    import matplotlib  # pyright: ignore[reportMissingImports]

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt  # pyright: ignore[reportMissingImports]

    shape = ", 32/8/128, pages of 16, " + ("bfloat16" if HAS_GPU else "float32")
    largest = {}
    for result in results:
        if found := re.fullmatch(rf"decode (\d+) x (\d+){shape}", result["problem"]):
            seqs, context = map(int, found.groups())
            # Of each context the largest batch.
            largest[context] = max(largest.get(context, (0, None)), (seqs, result), key=lambda pair: pair[0])
    points = defaultdict(list)
    for context, (_, result) in sorted(largest.items()):
        for row in result["rows"]:
            points[row["name"]].append((context, result["bytes"] / row["seconds"]["median"] / 1e9))
    points.pop("matrix rate", None)
    figure, axes = plt.subplots(figsize=(10, 5))
    for name, line in points.items():
        axes.plot(*zip(*line, strict=True), marker="o", linewidth=1, label=name)
    axes.set(
        xscale="log", xlabel="context, tokens", ylabel="GB/s, of the bytes counted", title=f"decode{shape}"
    )
    axes.set_xticks(list(largest), [f"{context:,}" for context in largest])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    # Beside the lines, not over them.
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.tight_layout()
    now = conditions()
    figure.savefig(RESULTS / f"attention-{now['machine']}-{now['date']}.png", dpi=110)
