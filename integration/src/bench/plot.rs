//! A comparison as a picture: the ratio of IOPS in each row, as SVG and as PNG.
//!
//! ```text
//!      |--|   spread of the rounds
//!    ======   target
//!    ##  ::   median, bound to CPUs and not
//! ```
//!
//! Where everything goes is decided in [`Layout`], in pixels; the rest draws it.

use crate::bench::compare::{Report, ratio};
use crate::bench::stats::Spread;
use crate::bench::targets::of_row;
use anyhow::{Context, Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{FontStyle, register_font};
use std::fs::{self, File};
use std::io::BufWriter;
use std::path::Path;

/// Size of the picture, in pixels.
const SIZE: (i32, i32) = (1280, 560);
/// Room around the bars: left, top, right, bottom.
const MARGIN: (i32, i32, i32, i32) = (60, 96, 20, 60);
/// Part of a row's width that its bars take.
const FILLED: f64 = 0.7;
/// Part of the height that the tallest thing takes, to leave room for its number.
const TALLEST: f64 = 0.93;

const INK: RGBColor = RGBColor(40, 40, 40);
const GRID: RGBColor = RGBColor(222, 222, 222);
const BARS: [RGBColor; 2] = [RGBColor(42, 111, 176), RGBColor(160, 196, 226)];
const TARGET: RGBColor = RGBColor(214, 96, 20);

/// In SVG the viewer's, in PNG the one that is in `integration/fonts`.
const FONT: &str = "sans-serif";
const FONT_BYTES: &[u8] = include_bytes!("../../fonts/DejaVuSans-subset.ttf");

/// A row: the ratio in each report, and what it has to be.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Its name.
    pub name: String,
    /// Bound to CPUs, then not; fewer where it was not measured.
    pub ratios: Vec<Spread>,
    /// The target of the first.
    pub target: Option<f64>,
}

/// A bar, in pixels from the top left.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bar {
    /// Left and right edge.
    pub x: (i32, i32),
    /// Where it ends, above.
    pub top: i32,
    /// Ends of the whisker: above and below.
    pub whisker: (i32, i32),
    /// Middle of its number's text: above the whisker, and not across the target's line.
    pub number: i32,
}

/// From the middle of a number's text to what it stands on.
const NUMBER_ABOVE: i32 = 9;

/// Where everything goes.
#[derive(Clone, Debug, PartialEq)]
pub struct Layout {
    /// The line that bars stand on.
    pub base: i32,
    /// Lines of the grid: the ratio, and how high that is.
    pub grid: Vec<(f64, i32)>,
    /// For each row its middle, and for each of its ratios the bar; none for what is no number.
    pub rows: Vec<(i32, Vec<Option<Bar>>)>,
    /// For each row that has one the target's line: left, right and height.
    pub targets: Vec<Option<(i32, i32, i32)>>,
}

impl Layout {
    /// Of these rows.
    #[must_use]
    pub fn of(rows: &[Row]) -> Self {
        let numbers =
            rows.iter().flat_map(|row| row.ratios.iter().map(|ratio| ratio.high).chain(row.target));
        // Parity is always in the picture.
        let max = numbers.filter(|n| n.is_finite()).fold(1.0, f64::max);
        let (left, top, right, bottom) = MARGIN;
        let base = SIZE.1 - bottom;
        let per_ratio = f64::from(base - top) * TALLEST / max;
        let y = |ratio: f64| base - pixel(ratio * per_ratio);
        let row_width = f64::from(SIZE.0 - left - right) / (rows.len().max(1)) as f64;
        let start = |n: usize| f64::from(left) + row_width * (n as f64 + (1.0 - FILLED) / 2.0);
        let number = |high: i32, target: Option<i32>| {
            let above = high - NUMBER_ABOVE;
            target
                .filter(|line| (line - above).abs() < NUMBER_ABOVE)
                .map_or(above, |line| line - NUMBER_ABOVE)
        };
        let bars = |n: usize, row: &Row| {
            let width = row_width * FILLED / row.ratios.len().max(1) as f64;
            let bar = |(at, ratio): (usize, &Spread)| {
                let all = [ratio.median, ratio.low, ratio.high];
                all.iter().all(|number| number.is_finite()).then(|| {
                    let x = start(n) + width * at as f64;
                    let (low, high) = (y(ratio.low), y(ratio.high));
                    Bar {
                        x: (pixel(x), pixel(x + width)),
                        top: y(ratio.median),
                        whisker: (high, low),
                        number: number(high, row.target.map(y)),
                    }
                })
            };
            let middle = pixel(start(n) + row_width * FILLED / 2.0);
            (middle, row.ratios.iter().enumerate().map(bar).collect())
        };
        let target = |(n, row): (usize, &Row)| {
            let (from, to) = (start(n), start(n) + row_width * FILLED);
            row.target.map(|target| (pixel(from) - 4, pixel(to) + 4, y(target)))
        };
        let step = step(max);
        let mut grid = Vec::new();
        let mut line = 0.0;
        while line <= max {
            grid.push((line, y(line)));
            line += step;
        }
        Self {
            base,
            grid,
            rows: rows.iter().enumerate().map(|(n, row)| bars(n, row)).collect(),
            targets: rows.iter().enumerate().map(target).collect(),
        }
    }
}

/// Distance of the grid's lines: five to ten of them, from parity on.
fn step(max: f64) -> f64 {
    [0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0]
        .into_iter()
        .find(|s| max / s <= 10.0)
        .unwrap_or(max / 5.0)
}

#[allow(clippy::cast_possible_truncation, reason = "a picture is smaller than 2^31 pixels")]
fn pixel(at: f64) -> i32 {
    at.round() as i32
}

/// The rows of a comparison: the first report decides which, the others add to them.
#[must_use]
pub fn rows(reports: &[Report]) -> Vec<Row> {
    let Some(first) = reports.first() else { return Vec::new() };
    let of = |name: &str| {
        let results = reports.iter().filter_map(|r| r.rows.iter().find(|row| row.row.name == name));
        results.map(|result| ratio(&result.pairs, |o| o.iops)).collect()
    };
    let row = |name: &str| Row {
        name: name.to_owned(),
        ratios: of(name),
        target: of_row(&first.config, name).iops.map(|target| target.bound()),
    };
    first.rows.iter().map(|result| row(result.row.name)).collect()
}

/// Writes `STEM.svg` and `STEM.png`.
pub fn write(stem: &Path, title: &str, facts: &str, rows: &[Row]) -> Result<()> {
    // Registered once; a second time changes nothing.
    register_font(FONT, FontStyle::Normal, FONT_BYTES)
        .map_err(|_| anyhow!("the plot's font cannot be read"))?;
    let size = (SIZE.0.unsigned_abs(), SIZE.1.unsigned_abs());
    let mut svg = String::new();
    draw(&SVGBackend::with_string(&mut svg, size).into_drawing_area(), title, facts, rows)?;
    let path = stem.with_extension("svg");
    fs::write(&path, svg).with_context(|| format!("cannot write {}", path.display()))?;
    let mut pixels = vec![0; 3 * size.0 as usize * size.1 as usize];
    draw(&BitMapBackend::with_buffer(&mut pixels, size).into_drawing_area(), title, facts, rows)?;
    let path = stem.with_extension("png");
    let file = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
    let mut encoder = png::Encoder::new(BufWriter::new(file), size.0, size.1);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    encoder.write_header()?.write_image_data(&pixels)?;
    Ok(())
}

type Point = (i32, i32);

/// An area with the few things that are drawn on it.
struct Canvas<'a, B: DrawingBackend>(&'a DrawingArea<B, Shift>);

impl<B: DrawingBackend> Canvas<'_, B>
where
    B::ErrorType: 'static,
{
    fn text(&self, text: &str, at: Point, size: i32, across: HPos, colour: RGBColor) -> Result<()> {
        let pos = Pos::new(across, VPos::Center);
        let style = (FONT, size).into_font().color(&colour).pos(pos);
        Ok(self.0.draw(&Text::new(text.to_owned(), at, style))?)
    }

    fn line(&self, from: Point, to: Point, colour: RGBColor, width: u32) -> Result<()> {
        Ok(self.0.draw(&PathElement::new(vec![from, to], colour.stroke_width(width)))?)
    }

    fn filled(&self, from: Point, to: Point, colour: RGBColor) -> Result<()> {
        Ok(self.0.draw(&Rectangle::new([from, to], colour.filled()))?)
    }

    fn bar(&self, bar: Bar, base: i32, median: f64, colour: RGBColor) -> Result<()> {
        let Bar { x: (from, to), top, whisker: (high, low), number } = bar;
        self.filled((from + 1, top), (to - 1, base), colour)?;
        let at = i32::midpoint(from, to);
        self.line((at, high), (at, low), INK, 1)?;
        for end in [high, low] {
            self.line((at - 4, end), (at + 4, end), INK, 1)?;
        }
        self.text(&format!("{median:.2}"), (at, number), 12, HPos::Center, INK)
    }

    fn legend(&self, rows: &[Row]) -> Result<()> {
        let mut entries = vec![("bound to CPUs", BARS[0])];
        if rows.iter().any(|row| row.ratios.len() > 1) {
            entries.push(("not bound", BARS[1]));
        }
        if rows.iter().any(|row| row.target.is_some()) {
            entries.push(("target", TARGET));
        }
        let y = 72;
        for ((entry, colour), n) in entries.into_iter().zip(0..) {
            let x = MARGIN.0 + 150 * n;
            self.filled((x, y - 5), (x + 18, y + 5), colour)?;
            self.text(entry, (x + 26, y), 13, HPos::Left, INK)?;
        }
        let note = "bars: median of all pairs; whiskers: lowest and highest median of a round";
        self.text(note, (SIZE.0 - MARGIN.2, y), 13, HPos::Right, INK)
    }
}

fn draw<B: DrawingBackend>(
    area: &DrawingArea<B, Shift>,
    title: &str,
    facts: &str,
    rows: &[Row],
) -> Result<()>
where
    B::ErrorType: 'static,
{
    let (layout, canvas) = (Layout::of(rows), Canvas(area));
    let (left, _, right, _) = MARGIN;
    area.fill(&WHITE)?;
    canvas.text(title, (left, 24), 20, HPos::Left, INK)?;
    canvas.text(facts, (left, 48), 13, HPos::Left, INK)?;
    for &(ratio, y) in &layout.grid {
        canvas.line((left, y), (SIZE.0 - right, y), GRID, 1)?;
        canvas.text(&format!("{ratio}"), (left - 8, y), 12, HPos::Right, INK)?;
    }
    for ((row, (middle, bars)), target) in rows.iter().zip(&layout.rows).zip(&layout.targets) {
        canvas.text(&row.name, (*middle, layout.base + 18), 13, HPos::Center, INK)?;
        for ((bar, ratio), colour) in bars.iter().zip(&row.ratios).zip(BARS) {
            match *bar {
                Some(bar) => canvas.bar(bar, layout.base, ratio.median, colour)?,
                None => {
                    canvas.text("none", (*middle, layout.base - 10), 12, HPos::Center, TARGET)?;
                }
            }
        }
        if let Some((from, to, y)) = *target {
            canvas.line((from, y), (to, y), TARGET, 3)?;
        }
    }
    canvas.line((left, layout.base), (SIZE.0 - right, layout.base), INK, 1)?;
    canvas.legend(rows)?;
    area.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(name: &str, ratios: &[(f64, f64, f64)], target: Option<f64>) -> Row {
        let ratios = ratios.iter().map(|&(median, low, high)| Spread { median, low, high });
        Row { name: name.to_owned(), ratios: ratios.collect(), target }
    }

    #[test]
    fn heights_are_in_proportion_and_everything_is_inside() {
        let rows = [
            row("a", &[(2.0, 1.5, 4.0), (1.0, 0.5, 1.5)], Some(3.0)),
            row("b", &[(1.0, 1.0, 1.0)], None),
        ];
        let Layout { base, grid, rows, targets } = Layout::of(&rows);
        let height = |y: i32| base - y;
        let (first, second) = (rows[0].1[0].unwrap(), rows[0].1[1].unwrap());
        assert!((height(first.top) - 2 * height(second.top)).abs() <= 1, "{rows:?}");
        let (from, to, target) = targets[0].unwrap();
        assert!((2 * height(target) - 3 * height(first.top)).abs() <= 2);
        assert!(from < first.x.0 && to > second.x.1 && first.x.1 <= second.x.0);
        // The whisker at 4 is the tallest thing, and is below the legend.
        assert_eq!(height(first.whisker.0), 2 * height(first.top));
        assert!(first.whisker.0 > MARGIN.1 && first.whisker.1 > first.top);
        assert!(rows[0].0 < rows[1].0 && rows[1].1[0].unwrap().x.1 < SIZE.0 - MARGIN.2);
        assert_eq!(grid.first(), Some(&(0.0, base)));
        assert!(grid.iter().any(|line| line.0 == 1.0), "parity has a line: {grid:?}");
        assert_eq!(targets[1], None);
    }

    #[test]
    fn a_target_is_not_drawn_across_a_number() {
        for target in [0.0, 0.5, 0.9, 1.0, 1.05, 1.1, 1.2, 1.5, 3.0] {
            let rows =
                [row("a", &[(1.0, 0.9, 1.1)], Some(target)), row("b", &[(8.0, 8.0, 8.0)], None)];
            let Layout { rows, targets, .. } = Layout::of(&rows);
            let (bar, line) = (rows[0].1[0].unwrap(), targets[0].unwrap().2);
            assert!(bar.number <= bar.whisker.0 - NUMBER_ABOVE, "{target}: {bar:?}");
            assert!((bar.number - line).abs() >= NUMBER_ABOVE, "{target}: {bar:?} {line}");
        }
    }

    #[test]
    fn what_is_no_number_has_no_bar_and_spoils_no_other() {
        let nothing = f64::NAN;
        let rows = [
            row("a", &[(nothing, nothing, f64::INFINITY)], None),
            row("b", &[(0.5, 0.5, 0.5)], None),
        ];
        let layout = Layout::of(&rows);
        assert_eq!(layout.rows[0].1, [None]);
        let bar = layout.rows[1].1[0].unwrap();
        assert!(bar.top > MARGIN.1 && bar.top < layout.base, "{bar:?}");
        assert!(Layout::of(&[]).rows.is_empty());
    }

    #[test]
    fn the_grid_has_a_few_lines_whatever_the_ratios() {
        for max in [1.0, 2.4, 9.8, 13.0, 49.0, 1e4] {
            let lines = Layout::of(&[row("a", &[(max, max, max)], None)]).grid.len();
            assert!((4..=12).contains(&lines), "{lines} lines up to {max}");
        }
    }

    #[test]
    fn both_pictures_are_written_and_show_something() {
        let dir = crate::workspace::TestDir::new("plot").unwrap();
        let rows = [row("r4k-d1-q1", &[(2.0, 1.5, 2.5)], Some(1.7))];
        write(&dir.join("bench"), "A & B", "facts", &rows).unwrap();
        let svg = fs::read_to_string(dir.join("bench.svg")).unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"), "{svg}");
        assert!(svg.contains("r4k-d1-q1") && svg.contains("A &amp; B") && svg.contains("2.00"));
        let file = std::io::BufReader::new(File::open(dir.join("bench.png")).unwrap());
        let mut reader = png::Decoder::new(file).read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        reader.next_frame(&mut pixels).unwrap();
        let has = |colour: RGBColor| {
            pixels.chunks(3).filter(|p| **p == [colour.0, colour.1, colour.2]).count()
        };
        assert!(has(BARS[0]) > 10_000 && has(TARGET) > 100 && has(WHITE) > 100_000);
        // Text: the font is there. Without it only lines of this colour are left.
        let name_row = &pixels[3 * 1280 * 510..3 * 1280 * 530];
        assert!(name_row.chunks(3).any(|p| p[0] < 100), "the row's name is drawn");
    }
}
