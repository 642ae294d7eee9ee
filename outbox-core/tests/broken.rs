//! The suites have teeth: every store and every sink that is broken on purpose fails exactly the scenarios it should.
//!
//! The tables say which. When a scenario is added or made sharper, run with `OUTBOX_PRINT_TABLE=1` to see what each
//! flaw fails now, and think about each difference before it goes into the table.

#![cfg(feature = "conformance")]
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a harness may fail its test and print what is asked for"
)]

use std::collections::BTreeSet;
use std::panic::AssertUnwindSafe;
use std::sync::Mutex;
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use outbox_core::conformance::broken::{
    BrokenSink, BrokenStore, SinkFlaw, StoreFlaw, with_sink_flaw, with_store_flaw,
};
use outbox_core::conformance::{prove_sink, prove_store, sink_scenarios, store_scenarios};

mod tables;

/// Both tests silence the panics that they provoke, which is one setting for the whole process.
static HOOK: Mutex<()> = Mutex::new(());

/// Longer than any scenario takes by the paused clock.
const TIMEOUT: Duration = Duration::from_secs(3_600 * 10);

#[test]
fn each_broken_store_fails_what_it_should() {
    let names: Vec<_> = store_scenarios::<BrokenStore>()
        .iter()
        .map(|scenario| scenario.name)
        .collect();
    compare(StoreFlaw::ALL, tables::STORES, &names, |flaw, name| {
        with_store_flaw(flaw, prove_store::<BrokenStore>(name)).boxed()
    });
}

#[test]
fn each_broken_sink_fails_what_it_should() {
    let names: Vec<_> = sink_scenarios::<BrokenSink>()
        .iter()
        .map(|scenario| scenario.name)
        .collect();
    compare(SinkFlaw::ALL, tables::SINKS, &names, |flaw, name| {
        with_sink_flaw(flaw, prove_sink::<BrokenSink>(name)).boxed()
    });
}

fn compare<F: Copy + PartialEq + std::fmt::Debug + Send + Sync>(
    flaws: &[F],
    table: &[(F, &[&str])],
    names: &[&'static str],
    prove: impl Fn(F, &'static str) -> BoxFuture<'static, ()> + Sync,
) {
    // The panics are what is wanted; their texts would be thousands of lines.
    let _alone = HOOK.lock();
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let failed: Vec<(F, BTreeSet<&str>)> = std::thread::scope(|scope| {
        let running: Vec<_> = flaws
            .chunks(flaws.len().div_ceil(4))
            .map(|part| {
                let prove = &prove;
                scope.spawn(move || {
                    let fails = |flaw: F| names.iter().copied().filter(move |name| fails(prove(flaw, name)));
                    part.iter()
                        .map(|flaw| (*flaw, fails(*flaw).collect()))
                        .collect::<Vec<_>>()
                })
            })
            .collect();
        running
            .into_iter()
            .flat_map(|thread| thread.join().unwrap())
            .collect()
    });
    std::panic::set_hook(hook);

    if std::env::var_os("OUTBOX_PRINT_TABLE").is_some() {
        for (flaw, failed) in &failed {
            println!("({flaw:?}, &{failed:?}),");
        }
        return;
    }
    let mut wrong = Vec::new();
    for (flaw, failed) in &failed {
        let expected = table.iter().find(|(own, _)| own == flaw).map(|(_, names)| *names);
        let expected: BTreeSet<&str> = expected.unwrap_or_default().iter().copied().collect();
        if expected.is_empty() || *failed != expected {
            wrong.push(format!(
                "{flaw:?} fails unexpectedly {:?} and passes unexpectedly {:?}",
                failed.difference(&expected).collect::<Vec<_>>(),
                expected.difference(failed).collect::<Vec<_>>()
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let toothless: Vec<_> = names
        .iter()
        .filter(|name| !failed.iter().any(|(_, failed)| failed.contains(**name)))
        .filter(|name| !tables::NEVER_FAILED.contains(name))
        .collect();
    assert!(
        toothless.is_empty(),
        "no flaw fails {toothless:?}: what are these scenarios for?"
    );
}

/// Whether a scenario fails, in a runtime of its own with a paused clock.
fn fails(scenario: BoxFuture<'static, ()>) -> bool {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()
        .unwrap();
    let bounded = async { tokio::time::timeout(TIMEOUT, scenario).await };
    !matches!(
        runtime.block_on(AssertUnwindSafe(bounded).catch_unwind()),
        Ok(Ok(()))
    )
}
