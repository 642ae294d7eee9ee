//! The edges between two steps of a relay, where tests kill its process.

/// The process dies here, at once, when a test wants it to: `FAILPOINTS="fetched=2*off->return"`, the third time. Without
/// the feature `failpoints` there is nothing here.
#[cfg(feature = "failpoints")]
pub(super) fn edge(name: &'static str) {
    fail::fail_point!(name, |_| std::process::abort());
}

#[cfg(not(feature = "failpoints"))]
pub(super) const fn edge(_name: &'static str) {}
