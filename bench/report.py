"""From measurements to figures: ratios within each round, their median and spread, their bars."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Final

from bench.load import Result

#: A visit in which anything else had more than this share of the server's core is disturbed.
DISTURBED: Final = 0.1
#: So many undisturbed rounds are better than more that are not.
_ENOUGH: Final = 3


@dataclass(frozen=True, slots=True)
class Figure:
    """One ratio over all rounds, with what it should be.

    Attributes:
        bar: what it must reach; None for a comparison without one.
        higher_is_better: whether the bar is a floor.
    """

    name: str
    median: float
    lowest: float
    highest: float
    bar: float | None = None
    aim: float | None = None
    higher_is_better: bool = False

    @property
    def is_met(self) -> bool:
        """Whether the median reaches the bar."""
        return self._reaches(self.bar)

    def _reaches(self, mark: float | None) -> bool:
        if mark is None:
            return True
        return self.median >= mark if self.higher_is_better else self.median <= mark

    def to_json(self) -> dict[str, object]:
        return asdict(self) | {"met": None if self.bar is None else self.is_met}

    def __str__(self) -> str:
        spread = f"({self.lowest:.3f} to {self.highest:.3f})"
        text = f"{self.name:<56} {self.median:>7.3f}  {spread:<18}"
        sign = ">=" if self.higher_is_better else "<="
        for word, mark in (("bar", self.bar), ("aim", self.aim)):
            if mark is not None:
                reached = "met" if self._reaches(mark) else "NOT MET"
                text += f"  {word} {sign} {mark:g} {reached}"
        return text


Rounds = Sequence[Mapping[str, Result]]


def undisturbed(rounds: Rounds) -> Rounds:
    """The rounds without a disturbed visit; all of them where those are too few to say anything."""
    steady = [one for one in rounds if all(visit.others <= DISTURBED for visit in one.values())]
    return steady if len(steady) >= _ENOUGH else rounds


def of_tokens(rounds: Rounds) -> list[Figure]:
    """What a token costs against R and F, and against another tree if there is one."""

    def cost(over: str, of: str = "coatcheck") -> list[float]:
        return [one[of].cpu_us / one[over].cpu_us for one in rounds]

    figures = [
        _figure(
            "tokens per core-second, Coatcheck over R",
            [1 / ratio for ratio in cost("R")],
            bar=1.5,
            aim=1.7,
            higher_is_better=True,
        ),
        _figure("CPU per token, Coatcheck over F", cost("F"), bar=1.25, aim=1.15),
    ]
    if "against" in rounds[0]:
        figures.append(_figure("CPU per token, Coatcheck over the other tree", cost("against")))
    return figures


def of_verification(rounds: Sequence[Mapping[str, float]]) -> list[Figure]:
    """What a verification costs against a raw one."""

    def over_raw(name: str) -> list[float]:
        return [one[name] / one["raw"] for one in rounds]

    return [
        _figure("verify_jwt of a new token, over raw verify", over_raw("cold"), bar=1.25),
        _figure(
            "verify_jwt of a remembered token, over raw verify", over_raw("remembered"), bar=0.03
        ),
        _figure(
            "authenticate, remembered token, over raw verify", over_raw("authenticate"), bar=0.1
        ),
    ]


def of_growth(rounds: Sequence[Sequence[Mapping[str, float]]]) -> list[Figure]:
    """What many API keys cost against few.  Each round has the few first."""

    def ratios(name: str) -> list[float]:
        return [many[name] / few[name] for few, many in rounds]

    more = [many["memory_mib"] - few["memory_mib"] for few, many in rounds]
    return [
        _figure("CPU per token, many keys over few", ratios("cpu_us"), bar=1.10),
        _figure("memory, many keys beyond few, MiB", more, bar=100),
        _figure("start to first token, many keys over few", ratios("start_s"), bar=1.5),
    ]


def of_fleet(full: Rounds, half: Rounds, facts: Mapping[str, Mapping[str, float]]) -> list[Figure]:
    """What a second worker and PostgreSQL cost, and how long callers wait at half load."""

    def cost(of: str, over: str) -> list[float]:
        return [one[of].cpu_us / one[over].cpu_us for one in full]

    figures = [
        _figure("CPU per token, two workers over one", cost("sqlite 2", "sqlite 1"), bar=1.15)
    ]
    if "postgres 1" in facts:
        figures += [
            _figure(
                "CPU per token, PostgreSQL over SQLite", cost("postgres 1", "sqlite 1"), bar=1.10
            ),
            _figure(
                "CPU per token, two workers over one, PostgreSQL",
                cost("postgres 2", "postgres 1"),
                bar=1.15,
            ),
        ]
    for name in facts:
        for what in ("p50_ms", "p99_ms"):
            waited = [getattr(one[name], what) / getattr(one["R"], what) for one in half]
            figures.append(_figure(f"{what[:3]} at half load over R's, {name}", waited))
    return figures


def facts_table(facts: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Start, memory and followers of each server."""
    lines = [f"{'server':<12} {'start s':>8} {'memory MiB':>11} {'CPU while followed':>19}"]
    lines += [
        f"{name:<12} {of['start_s']:>8.2f} {of['memory_mib']:>11.1f} {of['followers_cpu']:>18.1%}"
        for name, of in facts.items()
    ]
    return lines


def servers_table(rounds: Rounds) -> list[str]:
    """Each server's own figures, medians over the rounds.  Not for comparison between runs."""
    head = f"{'server':<12} {'CPU us/token':<22} {'tokens/s wall':>13} {'p50 ms':>7} {'p99 ms':>7}"
    lines = [f"{head} {'counted':>9} {'disturbed':>10}"]
    for name in rounds[0]:
        visits = [one[name] for one in rounds]
        cpu = [visit.cpu_us for visit in visits]
        disturbed = sum(visit.others > DISTURBED for visit in visits)
        lines.append(
            f"{name:<12} {f'{median(cpu):.1f} ({min(cpu):.1f} to {max(cpu):.1f})':<22}"
            f" {median(visit.tokens / visit.seconds for visit in visits):>13.0f}"
            f" {median(visit.p50_ms for visit in visits):>7.2f}"
            f" {median(visit.p99_ms for visit in visits):>7.2f}"
            f" {sum(visit.tokens for visit in visits):>9}"
            f" {f'{disturbed} of {len(visits)}':>10}"
        )
    return lines


def _figure(
    name: str,
    ratios: Sequence[float],
    *,
    bar: float | None = None,
    aim: float | None = None,
    higher_is_better: bool = False,
) -> Figure:
    return Figure(name, median(ratios), min(ratios), max(ratios), bar, aim, higher_is_better)
