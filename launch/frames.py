"""How a run is drawn: a frame for a terminal, lines for a pipe. Pure; `launch/console.py` puts them on the screen."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console as Screen
from rich.console import ConsoleOptions, Group, RenderableType, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from launch.bottleneck import bottleneck
from launch.chart import printable, sparkline
from launch.history import Row
from launch.picture import (
    RECENT_STEPS,
    Doing,
    Picture,
    doings,
    duration,
    left_s,
    num_steps,
    seconds_per_step,
    steps_done,
)
from launch.scores import overall, percent

ALWAYS_SHOWN = ("offered", "queued", "leased", "finished", "trained")
"""What may have become of a prompt; "filtered" and "failed" are shown when there are any."""


def frame(picture: Picture) -> RenderableType:
    """The live view of a terminal."""
    lines: list[RenderableType] = [_line(_title(picture), "bold"), _progress(picture)]
    if picture.warmup and not picture.steps:
        lines.append(_line(_warm_start(picture)))
    if picture.steps:
        lines += [_Parts(parts) for parts in (_curves(picture), _staleness(picture)) if parts]
    if picture.status.get("ledger"):
        lines.append(_Parts(_ledger(picture.status["ledger"]), "dim"))
    lines.append(_table(picture))
    lines.append(_line(f"bottleneck: {bottleneck(picture.waiting, picture.config, picture.cores)}"))
    lines.append(_line(f"logs: {picture.run_dir}/logs   curves: tensorboard --logdir {picture.run_dir}", "dim"))
    return Group(*lines)


def step_line(row: Row, picture: Picture) -> str:
    """One finished step."""
    parts = [f"step {row['step'] + 1}/{num_steps(picture) or '?'}"]
    named = (
        ("reward", "reward/mean", "{:.3f}"),
        ("kl to reference", "policy/kl_reference", "{:z.4f}"),
        ("mismatch", "mismatch/kl", "{:z.4f}"),
        ("entropy", "policy/entropy", "{:.2f}"),
        ("length", "completion/length_mean", "{:.0f}"),
        ("staleness", "staleness/mean", "{:.1f}"),
        ("waited", "time/waiting_for_trajectories", "{:.0%}"),
    )
    parts += [f"{label} {form.format(row[key])}" for label, key, form in named if row.get(key) is not None]
    pace = seconds_per_step(picture.steps)
    return "  ".join([*parts, *([f"{pace:.2f} s/step  ETA {duration(left_s(picture, pace))}"] if pace else [])])


def evaluation_line(row: Row, beside: Sequence[str] = ()) -> str:
    """`beside`: the functions that only evaluation uses."""
    of_all = overall(row) or {"prompts": row["num_prompts"], "metrics": {}}
    failed = f"; {row['errors']} failed" if row.get("errors") else ""
    version, accuracy, scored = row["version"], row["accuracy"], of_all["prompts"]
    if accuracy is None:
        means = ", ".join(f"{name} {value:.4g}" for name, value in row.get("rewards", {}).items() if "/" not in name)
        return f"evaluation of version {version}: {means or 'no completion was scored'}{failed}"
    k = row.get("samples_per_prompt", 1)
    counted = f"{round(accuracy * scored)} of {scored}" if k == 1 else f"mean@{k} of {scored} prompts"
    parts = [f"accuracy {accuracy:.1%} ({counted}{failed})"]
    metrics = of_all["metrics"]
    parts += [f"{name} {percent(metrics[name])}" for name in (f"pass@{k}", f"maj@{k}") if k > 1 and name in metrics]
    for name in beside:
        value = (overall(row, name) or of_all)["metrics"].get(f"mean@{k}")
        parts.append(f"{name} {'not scored' if value is None else percent(value)}")
    return f"evaluation of version {version}: {', '.join(parts)}"


def warmup_line(row: Row, picture: Picture) -> str | None:
    """The supervised warm start, every fifth of it."""
    done, total = row["step"] + 1, picture.config.warmup.steps
    return f"warm start {done}/{total}  loss {row['warmup/loss']:.3f}" if done % max(1, total // 5) == 0 else None


def waiting_line(picture: Picture, for_s: float) -> str:
    """Who waits for what when no step has ended for a while."""
    if not picture.status:
        states = ", ".join(f"{seen.name} {seen.state}" for seen in picture.processes)
        return f"waiting {for_s:.0f} s for the broker's first answer  {states}"
    each = " | ".join(f"{doing.name}: {doing.state}{_since(doing)}" for doing in doings(picture))
    return f"waiting {for_s:.0f} s for step {steps_done(picture) + 1}  {each}"


def stamp(text: str, now: float) -> str:
    """A line of a pipe's log: the time of day in front."""
    return f"{time.strftime('%H:%M:%S', time.localtime(now))} {text}"


def _title(picture: Picture) -> str:
    config = picture.config
    generators = f"{config.generators.count} generator{'s' * (config.generators.count != 1)}"
    ranks = f"{config.learner.ranks} learner rank{'s' * (config.learner.ranks != 1)}"
    model = Path(config.model.path).name if Path(config.model.path).is_absolute() else config.model.path
    return f"{picture.name}   {config.algorithm.advantage.upper()} · {model} · {generators} + {ranks}"


def _progress(picture: Picture) -> RenderableType:
    total, done = num_steps(picture), steps_done(picture)
    if not total:
        return _line("starting: the broker reads the data")
    row = Table.grid(padding=(0, 2), expand=True)
    row.add_column(no_wrap=True)
    row.add_column(ratio=1)
    row.add_column(no_wrap=True)
    pace = seconds_per_step(picture.steps)
    speed = f"   {pace:.2f} s/step   ETA {duration(left_s(picture, pace))}" if pace else ""
    phase = picture.status.get("phase", "no answer from the broker")
    if phase == "running":
        phase = f"version {picture.status['version']}"
    told = f"{done / total:.0%}{speed}   {phase}"
    row.add_row(f"step {done}/{total}", ProgressBar(total=total, completed=done), Text(told))
    return row


def _since(doing: Doing) -> str:
    return f" {duration(doing.for_s)}" if doing.for_s else ""


def _curves(picture: Picture) -> list[str]:
    rewards = [row["reward/mean"] for row in picture.steps if row.get("reward/mean") is not None]
    parts = [f"reward {rewards[-1]:.3f} {sparkline(rewards, 16)}"] if rewards else []
    if len(rewards) > RECENT_STEPS:
        parts[-1] += f" ({rewards[-1] - rewards[-1 - RECENT_STEPS]:+.3f}/{RECENT_STEPS})"
    evaluations = [row for row in picture.evaluations if row["accuracy"] is not None]
    if evaluations:
        first, last = evaluations[0], evaluations[-1]
        parts.append(f"eval {last['accuracy']:.1%} @v{last['version']}")
        if last["version"] != first["version"]:
            parts[-1] += f" (was {first['accuracy']:.1%})"
    row = picture.steps[-1]
    named = (
        ("kl to reference", "policy/kl_reference", "{:z.4f}"),
        ("mismatch", "mismatch/kl", "{:z.4f}"),
        ("entropy", "policy/entropy", "{:.2f}"),
        ("length", "completion/length_mean", "{:.0f}"),
        ("cut off", "completion/truncated_frac", "{:.1%}"),
    )
    return parts + [f"{label} {form.format(row[key])}" for label, key, form in named if row.get(key) is not None]


def _warm_start(picture: Picture) -> str:
    losses = [row["warmup/loss"] for row in picture.warmup if row["warmup/loss"] is not None]
    done = f"warm start {len(picture.warmup)}/{picture.config.warmup.steps}"
    return f"{done}   loss {losses[-1]:.3f} {sparkline(losses, 16)}" if losses else done


def _staleness(picture: Picture) -> list[str]:
    row = picture.steps[-1]
    if row.get("staleness/mean") is None:
        return []
    mean, oldest, bound = row["staleness/mean"], row["staleness/max"], picture.config.staleness.max
    speed = row.get("throughput/tokens_per_s")
    trained = [f"trained {speed:,.0f} tok/s"] if speed else []
    return [f"staleness mean {mean:.2f}  max {oldest:.0f} of {bound}", *trained]


def _ledger(counts: Mapping[str, int]) -> list[str]:
    shown = ["prompts", *(f"{name} {counts[name]:,}" for name in ALWAYS_SHOWN if name in counts)]
    for end in ("filtered", "failed"):
        if counts.get(end):
            reasons = [
                f"{name.partition('/')[2]} {n:,}" for name, n in counts.items() if name.startswith(f"{end}/") and n
            ]
            shown.append(f"{end} {counts[end]:,}" + (f" ({', '.join(reasons)})" if reasons else ""))
    return shown


def _table(picture: Picture) -> RenderableType:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), expand=True, header_style="dim")
    for heading, options in (
        ("process", {"no_wrap": True}),
        ("device", {"no_wrap": True}),
        ("doing", {"no_wrap": True, "ratio": 1, "overflow": "ellipsis"}),
        ("for", {"no_wrap": True, "justify": "right"}),
        ("rate", {"no_wrap": True, "justify": "right"}),
        ("version", {"no_wrap": True, "justify": "right"}),
    ):
        table.add_column(heading, **options)
    for doing in doings(picture):
        rate = f"{doing.rate:,.0f} tok/s" if doing.rate is not None else ""
        version = str(doing.version) if doing.version is not None and doing.version >= 0 else ""
        since = duration(doing.for_s) if doing.for_s else ""
        table.add_row(*(Text(cell) for cell in (doing.name, doing.device, doing.state, since, rate, version)))
    return table


def _line(text: str, style: str = "") -> Text:
    return Text(printable(text), style=style)


@dataclass(frozen=True, slots=True)
class _Parts:
    """Texts side by side; a narrow terminal breaks the line between two of them."""

    parts: Sequence[str]
    style: str = ""

    def __rich_console__(self, screen: Screen, options: ConsoleOptions) -> RenderResult:
        lines: list[str] = []
        for part in map(printable, self.parts):
            if lines and cell_len(f"{lines[-1]}   {part}") <= options.max_width:
                lines[-1] += f"   {part}"
            else:
                lines.append(part)
        yield Text("\n".join(lines), style=self.style)
