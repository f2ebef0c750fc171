"""A plan as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from eyespot.plan.devices import BANDWIDTH_SHARE, HERE, HOST_S, PRODUCTS_SHARE
from eyespot.plan.make import Estimate, Plan, Profile, StagePlan, SwitchEffect


def show(plan: Plan, console: Console) -> None:
    """Print everything a plan says, and what it is based on."""
    for stage in plan.stages:
        if len(plan.stages) > 1 or plan.left_out:
            console.rule(f"stage {stage.name} ({stage.kind})", align="left")
        _stage(stage, console)
    for name in plan.left_out:
        console.print(f"stage {name} (preference) is trained by TRL; nothing is said about it", markup=False)
    if len(plan.stages) > 1:
        rows = [(device, shown_hours(hours), shown_dollars(dollars)) for device, hours, dollars in plan.totals]
        console.print(table("all stages", ("device", "time", "cost"), rows))
    _bases(plan, console)


def _stage(stage: StagePlan, console: Console) -> None:
    source = "its own data" if stage.read else "assumed data"
    console.print(
        f"{stage.samples:,.0f} samples in {stage.steps:,} steps of {stage.batch_samples:.1f}, "
        f"{stage.pictures:,} pictures ({source})", markup=False, highlight=False,
    )  # fmt: skip
    if stage.keeps_features:
        console.print(f"features kept on disk: {stage.features_gb:.3g} GB", highlight=False)
    rows = [(part, f"{total:,}", f"{learn:,}") for part, (total, learn) in stage.parameters.items()]
    console.print(table("parameters", ("part", "all", "trainable"), rows))
    for profile in stage.profiles:
        _profile(profile, console)
    console.print(table(
        "time, for all devices of the run",
        ("device", "samples/s", "time", "cost", "peak GB", "fits", "largest batch"),
        map(_estimate, stage.estimates),
    ))  # fmt: skip
    if stage.switches:
        first, *others = stage.switches
        effects = [_effect(first, None), *(_effect(other, first) for other in others)]
        title = f"what switches change ({stage.estimates[0].device})"
        console.print(table(title, ("setting", "trainable", "GFLOP a sample", "peak GB", "samples/s"), effects))


def _profile(profile: Profile, console: Console) -> None:
    rows = [(place, f"{value:,.4g}") for place, value in profile.gflop.items()]
    rows.append(("all", f"{profile.gflop_per_sample:,.4g}"))
    console.print(table(f"GFLOP for a sample, {profile.precision}", ("part", "GFLOP"), rows))
    parts = [(name, f"{value / 1e9:.3f}") for name, value in profile.memory.items()]
    console.print(table(f"GB at the peak of training, {profile.precision}", ("for", "GB"), parts))
    sizes = profile.inference_gb
    lines = [
        (name, *(f"{curve[n]:.2f}" if n in curve else "" for n in sizes))
        for name, curve in (("training", profile.training_gb), ("inference", profile.inference_gb))
    ]
    console.print(table(f"GB by batch size, {profile.precision}", ("", *map(str, sizes)), lines))


def _estimate(estimate: Estimate) -> tuple[str, ...]:
    most = "none" if estimate.largest_batch is None else f"{estimate.largest_batch:,}"
    return (
        estimate.device, f"{estimate.samples_per_s:,.4g}", shown_hours(estimate.hours), shown_dollars(estimate.dollars),
        f"{estimate.memory_gb:.2f}", "yes" if estimate.fits else "no", most,
    )  # fmt: skip


def _effect(effect: SwitchEffect, planned: SwitchEffect | None) -> tuple[str, ...]:
    """A row; all but the first show how far they are from it."""
    values = (effect.gflop, effect.memory_gb, effect.samples_per_s)
    if planned is None:
        return (effect.name, f"{effect.trainable:,}", *(f"{value:,.4g}" for value in values))
    base = (planned.gflop, planned.memory_gb, planned.samples_per_s)
    return (
        effect.name,
        f"{effect.trainable:,}",
        *(f"{value:,.4g} ({100 * (value / before - 1):+.0f}%)" for value, before in zip(values, base, strict=True)),
    )


def _bases(plan: Plan, console: Console) -> None:
    say = [
        "FLOP and memory: traced, without weights. Training alone: no validation, no sample answers, no evaluation.",
    ]
    if plan.machine is not None:
        say.append(
            f"{HERE}: {plan.machine['name']}, {plan.machine['threads']} threads, measured {plan.machine['measured']}; "
            "memory is that of tensors, beside which a Python process with torch takes about half a gigabyte"
        )
    if plan.devices:
        say.append(
            f"GPUs: assumed, not measured: {PRODUCTS_SHARE:.0%} of the stated FLOP/s, {BANDWIDTH_SHARE:.0%} of the "
            f"bandwidth, {HOST_S * 1e6:.0f} us of Python for an operation, pictures that are loaded in time"
        )
        say += [
            f"{device['name']}: {device['flops'] / 1e12:.0f} TFLOP/s, {device['memory_gb']:.0f} GB, "
            f"{device['bandwidth'] / 1e9:,.0f} GB/s ({device['specification']}); {device['price']} dollars an hour "
            f"({device['price_source']})"
            for device in plan.devices
        ]
    for line in say:
        console.print(line, markup=False, highlight=False, style="dim")


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    found = Table(title=title or None, title_justify="left", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        found.add_column(column, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        found.add_row(*row)
    return found


def shown_hours(hours: float) -> str:
    if hours < 1 / 60:
        return f"{3600 * hours:.0f} s"
    return f"{60 * hours:.0f} min" if hours < 2 else f"{hours:,.1f} h"


def shown_dollars(dollars: float | None) -> str:
    return "" if dollars is None else f"${dollars:,.2f}"
