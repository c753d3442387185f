"""The doctor's page, in words that a step confirms"""

import math

from rich.console import Console
from rich.table import Table

from .diagnosis import Diagnosis, Force
from .trial import AS_IT_IS, Tried


def with_error(value: float, error: float) -> str:
    """1.2e-3 ± 2e-4."""
    value += 0.0  # -0 is 0
    return f"{value:.2g}" if math.isnan(error) else f"{value:.2g} ± {error:.1g}"


def sentences(of: Force) -> list[str]:
    """What is said of one surrogate below the table, each a claim of its own."""
    told = [
        f"{of.regime}; {of.reason}",
        f"to first order a step changes it by {with_error(of.change, of.change_error)}",
    ]
    if of.change_without is not None:
        told[-1] += f", without its term by {of.change_without:.2g}"
    told += [bent(each) for each in of.tried if each.what == AS_IT_IS and each.is_bent]
    if of.critical_coef is not None and not math.isnan(of.critical_coef_error):
        if abs(of.critical_coef) <= 2 * of.critical_coef_error:
            told.append("whether it falls or rises without a term is not told")
        else:
            share = 100 * of.critical_coef_error / abs(of.critical_coef)
            told.append(
                f"without a term it {'falls' if of.critical_coef > 0 else 'rises'}, and at the critical coef it stands "
                f"still to first order, give or take {share:.0f} % of that"
            )
    if of.above_eps is not None and of.above_eps < 0.5:
        below = f"{100 * (1 - of.above_eps):.0f} % of the variances"
        told.append(f"eps lies above {below}, and there this surrogate acts as the variance does")
    if of.drift_budget is not None:
        part = (
            f"half of ||F|| is certain to stay while the covariance moves by less than {of.drift_budget:.2g} of itself"
        )
        told.append(part if of.drift_noise is None else f"{part} (two batches of this policy: {of.drift_noise:.2g})")
    return told


def bent(of: Tried) -> str:
    """Where first order does not say what the step does."""
    return (
        f"the step is so large that it bends: realised {of.realised:.2g}, of which {of.straight:.2g} is of first order "
        f"and {of.bend:.2g} of second"
    )


def forces_table(of: Diagnosis) -> Table:
    table = Table(title="Forces in the step", title_justify="left")
    for column in ("surrogate", "regime", "push / gradient", "change a step", "critical coef", "coef", "advised"):
        table.add_column(column, no_wrap=column == "surrogate", overflow="fold")
    for each in of.forces:
        critical = each.critical_coef
        table.add_row(
            each.surrogate, each.regime,
            f"{abs(each.coef) * each.push / each.gradient:.1e}" if each.gradient > 0 else "-",
            with_error(each.change, each.change_error),
            "-" if critical is None else with_error(critical, each.critical_coef_error),
            f"{each.coef:.2g}" if each.is_in_recipe else "-",
            "-" if each.recommended_coef is None else f"{each.recommended_coef:.2g}",
        )  # fmt: skip
    return table


def tried_table(of: Diagnosis) -> Table:
    table = Table(title="The step tried out, and put back", title_justify="left")
    for column in ("surrogate", "step", "coef", "to first order", "realised", "of it bend", "on its own responses"):
        table.add_column(column, no_wrap=column == "surrogate", overflow="fold")
    for force in of.forces:
        for each in force.tried:
            table.add_row(force.surrogate, *row(each))
    return table


def row(of: Tried) -> list[str]:
    """Of the table of tried steps."""
    predicted, realised = (
        with_error(of.predicted, of.predicted_error),
        with_error(of.realised, of.realised_error),
    )
    return [of.what, f"{of.coef:.2g}", predicted, realised, f"{of.bend:.2g}", f"{of.realised_own:.2g}"]


def show(console: Console, of: Diagnosis) -> None:
    """One page."""
    console.print(f"[bold]{of.recipe}[/bold]: {of.verdict}", highlight=False)
    if of.entropy is not None:
        console.print(
            f"policy entropy {of.entropy:.3f} nats; about {of.tokens_per_step} tokens of width {of.width} a step; "
            f"{100 * (of.cut_off or 0):.0f} % of the responses cut off; {of.seconds:.0f} s\n",
            highlight=False,
        )
    if of.forces:
        console.print(forces_table(of))
        for each in of.forces:
            told = "; ".join(sentences(each))
            console.print(f"{each.surrogate}: {told}. Advised coef: {each.recommendation}.", highlight=False)
        if any(each.tried for each in of.forces):
            console.print(tried_table(of))
    for title, lines in (("Mistakes", of.mistakes), ("Notes", of.notes)):
        if lines:
            console.print(f"\n[bold]{title}[/bold]")
            for each in lines:
                console.print(f"- {each}", highlight=False)
