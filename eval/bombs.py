"""What answers that are made to be expensive cost the evaluation, at the limits a user has, and the one after each.

A bomb may take its limit of processor time, and no more; the answer after it is judged by a worker that was forked
anew. The wall clock is longer where other work shares the machine.
"""

import time

from rich.console import Console
from rich.table import Table

from hclm_rl.evaluation.math_judge import MathJudge
from hclm_rl.responses.limits import SECONDS, Unjudged

BOMBS = {
    "tower of three": "9^{9^{9}}",
    "tower of four": "9^{9^{9^9}}",
    "factorial of 11 digits": "99999999999!",
    "factorial of a factorial": "(20!)!",
    "sum of 10^9 terms": r"\sum_{i=1}^{1000000000} \frac{1}{i}",
    "product of 10^9 terms": r"\prod_{i=1}^{1000000000} i",
    "binomial": r"\binom{10^{12}}{10^{11}}",
    "power of a power, float": r"5000(1+\frac{0.06}{365})^{365 \cdot 10}",
    "integral without an end": r"\int_0^1 e^{x^{x^{x}}} dx",
    "2^100000": r"1.5 \cdot 2^{100000}",
    "5,000 digits": "1" * 5000,
    "5,000 decimals": "0." + "1" * 5000,
    "3,000 additions": "1+" * 3000 + "1",
    "2,000 fractions in each other": r"\frac{1}{" * 2000 + "1" + "}" * 2000,
    "2,000 brackets": "(" * 2000 + "1" + ")" * 2000,
    "2,000 roots": r"\sqrt{" * 2000 + "2" + "}" * 2000,
    "expansion of 60 brackets": "(x+1)" * 60,
    "set of 2,000 numbers": r"\{" + ",".join(map(str, range(2000))) + r"\}",
    "matrix of 40 x 40": r"\begin{pmatrix}" + r"\\".join(["&".join(["1"] * 40)] * 40) + r"\end{pmatrix}",
}  # fmt: skip
LONG = {
    "50,000 dollars": "$ " * 50_000,
    "50,000 numbers": "1 " * 50_000,
    "20,000 open boxes": r"\boxed{" * 20_000,
    "20,000 open tags": "<answer>" * 20_000,
}


def main() -> None:
    judge = MathJudge.of("42")
    assert isinstance(judge, MathJudge)
    judge(r"\boxed{41}")  # the worker starts
    table = Table(title=f"one response each; the limit is {SECONDS:g} s of processor time")
    for column in ("response", "judged", "wall s", "the next one, wall s"):
        table.add_column(column, justify="left" if column in ("response", "judged") else "right")
    worst, over = 0.0, 0
    responses = {name: rf"\boxed{{{bomb}}}" for name, bomb in BOMBS.items()} | LONG
    for name, response in responses.items():
        start = time.perf_counter()
        answer, is_right = judge(response)
        took = time.perf_counter() - start
        start = time.perf_counter()
        assert judge(r"\boxed{42}") == ("42", True) and not is_right
        after = time.perf_counter() - start
        worst, over = max(worst, took), over + isinstance(answer, Unjudged)
        said = "over the limits" if isinstance(answer, Unjudged) else "no answer" if answer is None else "wrong"
        table.add_row(name, said, f"{took:.2f}", f"{after:.2f}")
    Console().print(table)
    print(f"{len(responses)} responses, {over} over the limits; the longest took {worst:.1f} s")


if __name__ == "__main__":
    main()
