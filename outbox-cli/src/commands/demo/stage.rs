//! What can be watched while the demo runs: progress bars on a terminal, plain lines elsewhere; all on stderr.

use std::io::IsTerminal;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::output;

/// Counts, shared by all threads of the demo, and shown as bars.
pub(super) struct Progress {
    started: Instant,
    placed: AtomicU64,
    delivered: AtomicU64,
    applied: AtomicU64,
    /// Somebody wants out: the user, or an error.
    stopping: AtomicBool,
    /// The signal with which the user wanted out; 0 for none.
    signal: AtomicU8,
    /// Nothing more will be delivered: read what is there and end.
    finishing: AtomicBool,
    bars: Option<Bars>,
}

struct Bars {
    multi: MultiProgress,
    placed: ProgressBar,
    delivered: ProgressBar,
    applied: ProgressBar,
}

impl Progress {
    pub(super) fn new(orders: u32) -> Self {
        Self {
            started: Instant::now(),
            placed: AtomicU64::new(0),
            delivered: AtomicU64::new(0),
            applied: AtomicU64::new(0),
            stopping: AtomicBool::new(false),
            signal: AtomicU8::new(0),
            finishing: AtomicBool::new(false),
            bars: std::io::stderr()
                .is_terminal()
                .then(|| Bars::new(u64::from(orders))),
        }
    }

    /// Tells what has just happened, and when; nothing any more when the play ends early.
    pub(super) fn say(&self, text: impl AsRef<str>) {
        if self.stopping() {
            return;
        }
        let seconds = self.started.elapsed().as_secs_f64();
        let line = format!("{seconds:>5.1} s  {}", text.as_ref());
        match &self.bars {
            Some(bars) => bars.multi.suspend(|| output::notice(line)),
            None => output::notice(line),
        }
    }

    pub(super) fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    pub(super) fn placed(&self) {
        let placed = self.placed.fetch_add(1, Relaxed) + 1;
        if let Some(bars) = &self.bars {
            bars.placed.set_position(placed);
        }
    }

    pub(super) fn applied(&self, messages: usize, fresh: u64) {
        let delivered = self.delivered.fetch_add(messages as u64, Relaxed) + messages as u64;
        let applied = self.applied.fetch_add(fresh, Relaxed) + fresh;
        if let Some(bars) = &self.bars {
            bars.delivered.set_position(delivered);
            bars.applied.set_position(applied);
        }
    }

    /// How many effects there are so far.
    pub(super) fn effects(&self) -> u64 {
        self.applied.load(Relaxed)
    }

    /// Now that it is known how many committed, the bars can be full.
    pub(super) fn committed(&self, committed: usize) {
        if let Some(bars) = &self.bars {
            bars.delivered.set_length(committed as u64);
            bars.applied.set_length(committed as u64);
        }
    }

    pub(super) fn stop(&self) {
        self.stopping.store(true, Relaxed);
    }

    /// Ends the play because the user wants it.
    pub(super) fn interrupt(&self, signal: u8) {
        self.signal.store(signal, Relaxed);
        self.stop();
    }

    /// The signal with which the user ended the play.
    pub(super) fn interrupted(&self) -> Option<u8> {
        Some(self.signal.load(Relaxed)).filter(|signal| *signal != 0)
    }

    pub(super) fn stopping(&self) -> bool {
        self.stopping.load(Relaxed)
    }

    pub(super) fn finish(&self) {
        self.finishing.store(true, Relaxed);
    }

    pub(super) fn finishing(&self) -> bool {
        self.finishing.load(Relaxed) || self.stopping()
    }

    /// Takes the bars away.
    pub(super) fn close(&self) {
        if let Some(bars) = &self.bars {
            for bar in [&bars.placed, &bars.delivered, &bars.applied] {
                bar.finish_and_clear();
            }
        }
    }
}

impl Bars {
    fn new(orders: u64) -> Self {
        let colour = if output::colours_on_stderr() { ".cyan" } else { "" };
        let style = |tail: &str| {
            let template = format!("  {{prefix:<20}} {{bar:32{colour}}} {{pos:>7}} {tail}");
            ProgressStyle::with_template(&template)
                .unwrap_or_else(|_| ProgressStyle::default_bar())
                .progress_chars("━╸ ")
        };
        let multi = MultiProgress::new();
        let bar = |name: &'static str, tail: &str| {
            multi.add(ProgressBar::new(orders).with_style(style(tail)).with_prefix(name))
        };
        Self {
            placed: bar("orders placed", "of {len}"),
            delivered: bar("handed out by Kafka", ""),
            applied: bar("effects", ""),
            multi,
        }
    }
}
