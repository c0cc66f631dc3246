"""Line charts as SVG text: axes, grid, lines; colours come from the page's style."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Final

WIDTH: Final = 560
HEIGHT: Final = 300
LEFT: Final = 58
RIGHT: Final = 14
TOP: Final = 12
BOTTOM: Final = 42
NUM_COLORS: Final = 6
_INNER_WIDTH: Final = WIDTH - LEFT - RIGHT
_INNER_HEIGHT: Final = HEIGHT - TOP - BOTTOM

Point = tuple[float, float | None]


@dataclass(frozen=True, slots=True)
class Series:
    """One line; a y of None breaks it. `color` counts through the page's palette."""

    name: str
    points: Sequence[Point]
    color: int
    dashed: bool = False
    markers: bool = False
    filled: bool = False


@dataclass(frozen=True, slots=True)
class Rule:
    """A straight line across the chart, such as an objective."""

    at: float
    name: str
    vertical: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    """What is drawn, in the units of its labels."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    log_x: bool = False
    log_y: bool = False
    y_top: float | None = None
    rules: Sequence[Rule] = field(default=())
    note: str = ""


@dataclass(frozen=True, slots=True)
class Axis:
    """From values to pixels."""

    low: float
    high: float
    start: float
    length: float
    log: bool = False

    def place(self, value: float) -> float:
        """Pixel of a value; outside ones are kept at the border."""
        low, high = self.low, self.high
        if self.log:
            value, low, high = (math.log10(max(v, 1e-12)) for v in (value, low, high))
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + min(max(share, 0.0), 1.0) * self.length

    def ticks(self) -> list[float]:
        """Round values: about six, or 1-2-5 per decade."""
        if self.log:
            found = []
            for power in range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))):
                found += [factor * 10.0**power for factor in (1, 2, 5)]
            found = [tick for tick in found if self.low <= tick <= self.high]
            decades = [tick for tick in found if math.log10(tick) % 1 == 0]
            return decades if len(found) > 9 and len(decades) > 2 else found
        step = nice_step((self.high - self.low) / 5)
        first = math.ceil(self.low / step - 1e-9)
        count = math.floor(self.high / step + 1e-9) - first + 1
        return [(first + at) * step for at in range(count)]


def nice_step(rough: float) -> float:
    """1, 2 or 5 times a power of ten, not below `rough`."""
    if rough <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    return next(f * power for f in (1, 2, 5, 10) if f * power >= rough * (1 - 1e-9))


def show_number(value: float) -> str:
    """Short: 12.5k, 0.05, 3."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:.4g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:.4g}k"
    return f"{value:.4g}"


def draw(chart: Chart) -> str:
    """One `<svg>`; says so when there is nothing to draw."""
    points = [(x, y) for line in chart.series for x, y in line.points if y is not None]
    if not points:
        return '<p class="empty">no data</p>'
    x_axis, y_axis = _axes(chart, points)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(chart.title)}">',
        *_grid(chart, x_axis, y_axis),
        *(_draw_rule(rule, x_axis, y_axis) for rule in chart.rules),
        *(_draw_series(line, x_axis, y_axis) for line in chart.series),
        "</svg>",
    ]
    return "".join(parts)


def _axes(chart: Chart, points: Sequence[tuple[float, float]]) -> tuple[Axis, Axis]:
    xs, ys = [x for x, _ in points], [y for _, y in points]
    ys += [rule.at for rule in chart.rules if not rule.vertical and rule.at < 3 * max(ys)]
    x_low, x_high = min(xs), max(xs)
    if chart.log_x:
        x_low, x_high = max(x_low, 1e-6), max(x_high, 2e-6)
    elif x_low > 0 and x_low < 0.5 * x_high:
        x_low = 0.0
    if x_high <= x_low:
        x_low, x_high = (x_low / 2, x_high * 2) if chart.log_x else (x_low - 1, x_high + 1)
    y_low, y_high = 0.0, chart.y_top or max(ys) * 1.06 or 1.0
    if chart.log_y:
        y_low, y_high = max(min(y for y in ys if y > 0) / 1.3, 1e-6), max(ys) * 1.3
    return (
        Axis(x_low, x_high, LEFT, _INNER_WIDTH, chart.log_x),
        Axis(y_low, y_high, TOP + _INNER_HEIGHT, -_INNER_HEIGHT, chart.log_y),
    )


def _grid(chart: Chart, x_axis: Axis, y_axis: Axis) -> list[str]:
    bottom, right = TOP + _INNER_HEIGHT, LEFT + _INNER_WIDTH
    parts = []
    for tick in y_axis.ticks():
        y = y_axis.place(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        text = show_number(tick)
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">')
        parts.append(f"{text}</text>")
    for tick in x_axis.ticks():
        x = x_axis.place(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">')
        parts.append(f"{show_number(tick)}</text>")
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    middle = LEFT + _INNER_WIDTH / 2
    parts.append(f'<text class="label" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">')
    parts.append(f"{escape(chart.x_label)}</text>")
    across = TOP + _INNER_HEIGHT / 2
    parts.append(f'<text class="label" transform="translate(13 {across}) rotate(-90)"')
    parts.append(f' text-anchor="middle">{escape(chart.y_label)}</text>')
    return parts


def _draw_rule(rule: Rule, x_axis: Axis, y_axis: Axis) -> str:
    axis = x_axis if rule.vertical else y_axis
    if not axis.low <= rule.at <= axis.high:
        return ""
    if rule.vertical:
        x = x_axis.place(rule.at)
        line = f'x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{TOP + _INNER_HEIGHT}"'
        late = x > LEFT + 0.8 * _INNER_WIDTH
        place = f'x="{x + (-4 if late else 4):.1f}" y="{TOP + _INNER_HEIGHT - 6}"'
        place += ' text-anchor="end"' if late else ""
    else:
        y = y_axis.place(rule.at)
        line = f'x1="{LEFT}" x2="{LEFT + _INNER_WIDTH}" y1="{y:.1f}" y2="{y:.1f}"'
        place = f'x="{LEFT + 6}" y="{y - 4:.1f}"'
    return f'<line class="rule" {line}/><text class="rule-name" {place}>{escape(rule.name)}</text>'


def _draw_series(series: Series, x_axis: Axis, y_axis: Axis) -> str:
    color = f"c{series.color % NUM_COLORS}"
    parts, lines = [], _lines(series.points, x_axis, y_axis)
    for line in lines:
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in line)
        if series.filled and len(line) > 1:
            base = TOP + _INNER_HEIGHT
            closed = f"{path}L{line[-1][0]:.1f} {base}L{line[0][0]:.1f} {base}Z"
            parts.append(f'<path class="area {color}" d="{closed}"/>')
        dashed = " dashed" if series.dashed else ""
        parts.append(f'<path class="line {color}{dashed}" d="{path}"/>')
    if series.markers:
        for x, y in series.points:
            if y is not None:
                told = f"{series.name}: {show_number(x)}, {show_number(y)}"
                parts.append(
                    f'<circle class="dot {color}" cx="{x_axis.place(x):.1f}"'
                    f' cy="{y_axis.place(y):.1f}" r="3.2"><title>{escape(told)}</title></circle>'
                )
    return "".join(parts)


def _lines(points: Sequence[Point], x_axis: Axis, y_axis: Axis) -> list[list[tuple[float, float]]]:
    found: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if y is None:
            if found[-1]:
                found.append([])
        else:
            found[-1].append((x_axis.place(x), y_axis.place(y)))
    return [line for line in found if line]
