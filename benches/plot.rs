//! A drawing of drain rates and latencies, as SVG: two bar charts with logarithmic axes, because a baseline may be a
//! thousand times slower.

use std::fmt::Write as _;

use crate::results::{Finding, Results, figure};

const WIDTH: f64 = 820.0;
const LABELS: f64 = 280.0;
const FIGURES: f64 = 110.0;
const ROW: f64 = 22.0;
const HEAD: f64 = 44.0;

/// What is known of drains and latencies; charts without bars are left out.
pub(crate) fn drawing(results: &Results) -> String {
    let drains = bars(results, "drain", |finding| {
        (finding.metric == "rate").then(|| finding.system.clone())
    });
    let latencies = bars(results, "latency", |finding| {
        ["p50", "p99", "max"]
            .contains(&finding.metric.as_str())
            .then(|| format!("{}, {}, {}", finding.system, finding.case, finding.metric))
    });
    let mut body = String::new();
    let mut top = 0.0;
    for (title, bars) in [
        ("Draining a backlog, messages a second", drains),
        ("From commit to consume, milliseconds", latencies),
    ] {
        if !bars.is_empty() {
            top += chart(&mut body, top, title, &bars);
        }
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {top}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n{body}</svg>\n"
    )
}

struct Bar<'r> {
    label: String,
    finding: &'r Finding,
}

fn bars<'r>(
    results: &'r Results,
    workload: &str,
    label: impl Fn(&Finding) -> Option<String>,
) -> Vec<Bar<'r>> {
    let of_workload = results
        .findings
        .iter()
        .filter(|finding| finding.workload == workload);
    of_workload
        .filter_map(|finding| {
            Some(Bar {
                label: format!("{}: {}", finding.store, label(finding)?),
                finding,
            })
        })
        .collect()
}

/// Draws one chart and says how high it is.
fn chart(body: &mut String, top: f64, title: &str, bars: &[Bar<'_>]) -> f64 {
    let least = bars
        .iter()
        .map(|bar| bar.finding.min)
        .fold(f64::INFINITY, f64::min);
    let most = bars.iter().map(|bar| bar.finding.max).fold(0.0, f64::max);
    // Whole powers of ten around all values.
    let (low, high) = (least.max(1e-3).log10().floor(), most.max(1e-2).log10().ceil());
    let room = WIDTH - LABELS - FIGURES;
    let place = |value: f64| {
        LABELS + room * ((value.max(1e-3).log10() - low) / (high - low).max(1.0)).clamp(0.0, 1.0)
    };
    let mut put = |text: std::fmt::Arguments<'_>| {
        // Writing to a string does not fail.
        let _ = body.write_fmt(text);
    };
    put(format_args!(
        "<text x=\"8\" y=\"{:.0}\" font-size=\"14\" font-weight=\"bold\">{title}</text>\n",
        top + 20.0
    ));
    let bottom = top + HEAD + ROW * count(bars.len());
    let mut power = low;
    while power <= high {
        let (x, label) = (place(10f64.powf(power)), figure(10f64.powf(power)));
        put(format_args!(
            "<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{:.0}\" y2=\"{bottom:.0}\" stroke=\"#ddd\"/>\
             <text x=\"{x:.1}\" y=\"{:.0}\" fill=\"#777\" font-size=\"10\" text-anchor=\"middle\">{label}</text>\n",
            top + HEAD - 4.0,
            top + HEAD - 8.0
        ));
        power += 1.0;
    }
    for (index, bar) in bars.iter().enumerate() {
        let y = top + HEAD + ROW * count(index);
        let middle = y + ROW / 2.0;
        let (from, to) = (place(bar.finding.min), place(bar.finding.max));
        let fill = if bar.finding.system == "outbox" {
            "#2a78b8"
        } else {
            "#b8b8b8"
        };
        put(format_args!(
            "<text x=\"{:.0}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\
             <rect x=\"{LABELS}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"{fill}\"/>\
             <line x1=\"{from:.1}\" x2=\"{to:.1}\" y1=\"{middle:.1}\" y2=\"{middle:.1}\" stroke=\"black\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\">{}</text>\n",
            LABELS - 8.0,
            middle + 4.0,
            bar.label,
            y + 3.0,
            place(bar.finding.median) - LABELS,
            ROW - 6.0,
            place(bar.finding.max.max(bar.finding.median)) + 6.0,
            middle + 4.0,
            figure(bar.finding.median)
        ));
    }
    bottom + 12.0 - top
}

fn count(number: usize) -> f64 {
    u32::try_from(number).map_or(0.0, f64::from)
}
